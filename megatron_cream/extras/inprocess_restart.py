# SPDX-License-Identifier: Apache-2.0
"""Restart inside the process (``--inprocess-restart``), of the whole start of a run.

Megatron 0.19.2 wraps its ``pretrain`` for nvidia-resiliency-ext, which calls it again after a
failure. By then the arguments are gone (``destroy_global_state``), the model's config has the
failed attempt's functions in it, and all attempts share one store, because the parameter that the
attempt's number should come by has a type that the package does not look for. So what is wrapped
here is everything from the arguments on, and each attempt has its own copy of them.
"""

# Annotations stay types: nvidia-resiliency-ext hands its wrapper to the parameter that has its.

import copy
import functools
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec

from megatron_cream.errors import UserError
from megatron_cream.mcore.extra import Extra

Start = Callable[..., None]


def run(start: Start, args: Namespace) -> None:
    """Call ``start(args, store=..., inprocess_call_wrapper=...)``, and again after a failure.

    Args:
        start: takes the two on to Megatron's ``pretrain``, which gives every attempt keys of its
            own in the store.
        args: validated, and set in Megatron's globals.
    """
    from megatron.training import inprocess_restart
    from nvidia_resiliency_ext.inprocess import CallWrapper

    untouched = copy.deepcopy(args)

    def attempt(call: CallWrapper = None) -> None:
        own = _set_again(untouched) if call.iteration else args
        start(own, store=store, inprocess_call_wrapper=call)

    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(attempt)
    wrapped()


def _set_again(untouched: Namespace) -> Namespace:
    from megatron.training.global_vars import set_global_variables

    args = copy.deepcopy(untouched)
    set_global_variables(args)
    return args


class InprocessRestart(Extra):
    """``--inprocess-restart``."""

    def validate_machine(self, args: Namespace) -> None:
        if args.inprocess_restart and find_spec("nvidia_resiliency_ext") is None:
            raise UserError(
                "--inprocess-restart is given: it needs the package nvidia-resiliency-ext, without "
                "which Megatron would train as if it were not"
            )

    def wrap_start(self, start: Start, args: Namespace) -> Start:
        return functools.partial(run, start) if args.inprocess_restart else start


EXTRA = InprocessRestart()
