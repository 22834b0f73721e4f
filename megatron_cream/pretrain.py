# SPDX-License-Identifier: Apache-2.0
"""Train with Megatron's own trainer, our positions, angles and data.

    torchrun --nproc-per-node 8 -m megatron_cream.pretrain <Megatron's flags> \\
        --seq-length 4096 --target-length 32768 \\
        --position-strategy cream --rope-interpolation linear

Takes every flag of Megatron's pretraining. ``--cpu`` runs it on a machine with no GPU.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from megatron_cream.config import ExtensionConfig


def main() -> None:
    """Parse, check and train; bad input ends in one line and exit status 2."""
    from_cpu = "--cpu" in sys.argv[1:]
    try:
        if from_cpu:
            from megatron_cream.training import cpu

            cpu.install()
            sys.argv[1:1] = cpu.FLAGS
        args = prepare()
    except (ValueError, FileNotFoundError, RuntimeError, AssertionError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    train(args)


def prepare() -> Namespace:
    """Parse ``sys.argv`` and check all of it before a GPU is asked for.

    Raises:
        ValueError, FileNotFoundError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from megatron_cream.checkpoint.saved import SETTINGS_KEY
    from megatron_cream.training.arguments import add_arguments

    # Ours first: Megatron's own validation prints hundreds of lines that would bury an error.
    args = parse_args(add_arguments)
    extension = None if args.use_checkpoint_args else check(args)
    args = parse_and_validate_args(add_arguments)
    extension = extension or check(args)
    # Micro-batches may hold different numbers of trained tokens (texts end, borders are masked);
    # averaging their averages would make the result depend on the layout.
    args.calculate_per_token_loss = True
    setattr(args, SETTINGS_KEY, extension.to_dict())
    return args


def check(args: Namespace) -> ExtensionConfig:
    """Check flags, datasets and checkpoints, and return the settings of the extension."""
    from megatron_cream.training import arguments, checks, cpu

    arguments.refuse_unsupported(args)
    if args.cpu:
        cpu.refuse_unserved(args)
    extension = arguments.extension_from_args(args)
    checks.check_datasets(args, extension)
    checks.check_checkpoint(args, extension)
    return extension


def train(args: Namespace) -> None:
    """Hand over to Megatron's ``pretrain``."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.checkpoint.saved import SETTINGS_KEY
    from megatron_cream.training import hooks, report
    from megatron_cream.training.data import datasets_provider
    from megatron_cream.training.megatron import answer_for_dataset_helpers
    from megatron_cream.training.step import forward_step

    answer_for_dataset_helpers()
    extension = ExtensionConfig.from_dict(getattr(args, SETTINGS_KEY))
    config = hooks.model_config(args, extension)
    if args.rank == 0:
        print(report.start_block(args, extension), flush=True)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
