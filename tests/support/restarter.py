# SPDX-License-Identifier: Apache-2.0
"""Megatron's trainer under a stand-in for nvidia-resiliency-ext, whose wheels want newer systems.

It does what the package does to one rank: hand the attempt's number to the parameter of its own
type, and after a failure take Megatron's state down and call again.
"""

import inspect
import sys
import types
from importlib.machinery import ModuleSpec

MODULE = "nvidia_resiliency_ext.inprocess"


class CallWrapper:
    def __init__(self, iteration):
        self.iteration = iteration


def train(flags, losses, fail_at):
    """Run ``megatron_cream.pretrain``, failing once before step ``fail_at``."""
    from support.ranks import keep_losses

    for name in (MODULE.split(".")[0], MODULE):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules[MODULE].CallWrapper = CallWrapper
    _wrap_as_the_package_does()
    fail_once(fail_at)
    keep_losses(losses)
    from megatron_cream import pretrain

    sys.argv = ["pretrain", "--cpu", *flags, "--inprocess-restart"]
    pretrain.main()


def _wrap_as_the_package_does():
    import torch
    from megatron.training import inprocess_restart

    def maybe_wrap(function):
        parameters = inspect.signature(function).parameters.values()
        (wanted,) = [each.name for each in parameters if each.annotation is CallWrapper]

        def wrapped():
            for iteration in range(2):
                try:
                    return function(**{wanted: CallWrapper(iteration)})
                except ArithmeticError:
                    inprocess_restart.destroy_state()
                    torch.distributed.destroy_process_group()
            raise RuntimeError("it failed twice")

        return wrapped, torch.distributed.HashStore()

    inprocess_restart.maybe_wrap_for_inprocess_restart = maybe_wrap


def fail_once(at):
    """Have the trainer raise before step ``at`` of this process, all its attempts counted."""
    from megatron.training import training

    own, calls = training.train_step, []

    def train_step(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            raise ArithmeticError("a step that fails, once")
        return own(*args, **kwargs)

    training.train_step = train_step
