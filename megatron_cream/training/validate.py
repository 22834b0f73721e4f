# SPDX-License-Identifier: Apache-2.0
"""Whether flags are right: one function, asked by training, by a script's start and the dry run."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from megatron_cream.config import ExtensionConfig
from megatron_cream.extras import hybrid
from megatron_cream.extras.clex import flags
from megatron_cream.mcore import blend_flags, cpu, flag_ranges, schedule_flags, unsupported_flags
from megatron_cream.mcore.validation_errors import megatron_validation_errors
from megatron_cream.training import arguments


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
    with megatron_validation_errors(validated):
        _validate(validated, defaults or {})
    schedule_flags.validate_schedule(validated)
    return extension, validated


def check_ours(args: Namespace) -> ExtensionConfig:
    """Check what Megatron does not, of arguments before or after its validation."""
    flag_ranges.validate_required(args)
    flag_ranges.validate_ranges(args)
    flag_ranges.validate_divisibility(args)
    unsupported_flags.validate_supported(args)
    hybrid.validate_pattern(args)
    if args.cpu:
        cpu.validate_flags(args)
    blend_flags.validate_blend(args)
    extension = arguments.extension_from_args(args)
    if extension.draws_scales:
        flags.validate_flags(args)
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

    from megatron_cream.mcore.hooks import megatron_config

    args = copy.deepcopy(validated)
    with megatron_validation_errors(args):
        pretrain_cfg_container_from_args(args, megatron_config(args))
