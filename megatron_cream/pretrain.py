# SPDX-License-Identifier: Apache-2.0
"""Train with Megatron's own trainer, our positions, angles and data.

    torchrun --nproc-per-node 8 -m megatron_cream.pretrain <Megatron's flags> \\
        --seq-length 4096 --target-length 32768 \\
        --position-strategy cream --rope-interpolation linear

Takes every flag of Megatron's pretraining. ``--cpu`` runs it on a machine with no GPU. To start
an existing training script with our positions instead, see ``megatron_cream.launch``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_cream.errors import one_line_errors
from megatron_cream.mcore.extra import extras
from megatron_cream.training import startup


def main() -> None:
    """Parse, check and train; bad input ends in one line and exit status 2."""
    with one_line_errors():
        startup.prepare_process("megatron_cream.pretrain")
        args = prepare()
    start = train
    for extra in extras():
        start = extra.wrap_start(start, args)
    start(args)


def prepare() -> Namespace:
    """Parse ``sys.argv`` and check all of it before a GPU is asked for.

    Raises:
        UserError, OSError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_and_validate_args

    return startup.parse(parse_and_validate_args)


def train(args: Namespace, **more: Any) -> None:
    """Call Megatron's ``pretrain``, which takes ``more`` as it is."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.mcore.hooks import megatron_config
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

    config = megatron_config(args)
    startup.ready(args, config)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        **more,
    )


if __name__ == "__main__":
    main()
