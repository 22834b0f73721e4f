# SPDX-License-Identifier: Apache-2.0
"""Train with Megatron's own trainer, our positions, angles and data.

    torchrun --nproc-per-node 8 -m megatron_cream.pretrain <Megatron's flags> \\
        --seq-length 4096 --target-length 32768 \\
        --position-strategy cream --rope-interpolation linear

Takes every flag of Megatron's pretraining. ``--cpu`` runs it on a machine with no GPU. To start
an existing training script with our positions instead, see ``megatron_cream.launch``.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from megatron_cream.errors import one_line_errors
from megatron_cream.extras import extras
from megatron_cream.training import entry, machine


def main() -> None:
    """Parse, check and train; bad input ends in one line and exit status 2."""
    with one_line_errors():
        machine.require_launcher("megatron_cream.pretrain", sys.argv[1:])
        entry.install_cpu_stand_in()
        args = prepare()
    train(args)


def prepare() -> Namespace:
    """Parse ``sys.argv`` and check all of it before a GPU is asked for.

    Raises:
        ValueError, FileNotFoundError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_and_validate_args

    return entry.parse(parse_and_validate_args)


def train(args: Namespace) -> None:
    """Hand over to Megatron's ``pretrain``, once or as often as --inprocess-restart asks for."""
    run = start
    for extra in extras():
        run = extra.wrap_start(run, args)
    run(args)


def start(args: Namespace, **more: Any) -> None:
    """Call Megatron's ``pretrain``, which takes ``more`` as it is."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.mcore import hooks
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

    config = hooks.megatron_config(args)
    entry.ready(args, config)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        **more,
    )


if __name__ == "__main__":
    main()
