# SPDX-License-Identifier: Apache-2.0
"""Whether flags are right: one function, asked by training, by a script's start and the dry run."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from megatron_cream.config import ExtensionConfig
from megatron_cream.training import (
    arguments,
    blend,
    clex,
    cpu,
    hybrid,
    ranges,
    schedule,
    unsupported,
)
from megatron_cream.training.refusals import megatrons_refusals


def check_flags(
    args: Namespace, defaults: dict[str, Any] | None = None
) -> tuple[ExtensionConfig, Namespace]:
    """Check all that flags alone say, on any machine; no dataset or checkpoint is looked at.

    Args:
        args: as parsed; not changed.
        defaults: a script's own, as Megatron's validation takes them.

    Returns:
        The settings of the extension, and a copy of the arguments that Megatron has validated.

    Raises:
        UserError: naming the flag, its value and the value needed.
    """
    extension = check_ours(args)
    validated = copy.deepcopy(args)
    with megatrons_refusals(validated):
        _validate(validated, defaults or {})
    schedule.refuse_schedule(validated)
    return extension, validated


def check_ours(args: Namespace) -> ExtensionConfig:
    """Check what Megatron does not, of arguments before or after its validation."""
    ranges.refuse_missing(args)
    ranges.refuse_out_of_range(args)
    ranges.refuse_uneven(args)
    unsupported.refuse_unsupported(args)
    hybrid.refuse_pattern(args)
    if args.cpu:
        cpu.refuse_unserved(args)
    blend.refuse_blend(args)
    extension = arguments.extension_from_args(args)
    if extension.draws_scales:
        clex.refuse_unserved(args)
    return extension


def _validate(args: Namespace, defaults: dict[str, Any]) -> None:
    from megatron.training.arguments import validate_args

    args.calculate_per_token_loss = True  # as training will; entry.py says why
    validate_args(args, defaults)


def check_model(validated: Namespace) -> None:
    """Make the configs that Megatron makes of its flags, which check more of them.

    Raises:
        UserError: with Megatron's reason.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.training.hooks import stock_config

    args = copy.deepcopy(validated)
    with megatrons_refusals(args):
        pretrain_cfg_container_from_args(args, stock_config(args))
