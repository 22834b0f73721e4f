# SPDX-License-Identifier: Apache-2.0
"""Our flags in Megatron's parser, and the settings they make."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_cream.config import (
    DEFAULT_UNIT,
    LABEL_RULES,
    SAMPLE_UNITS,
    ExtensionConfig,
)
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.mcore.hooks import extras
from megatron_cream.mcore.validation import make_readable
from megatron_cream.positions import STRATEGIES
from megatron_cream.positions.strategy import strategy_class
from megatron_cream.rope import SCALINGS
from megatron_cream.rope.flags import add_rope_flags, options_from_args, read_base
from megatron_cream.rope.scaling import scaling_class


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags; lengths are in tokens. Defaults that depend on others are None here."""
    make_readable(parser)
    group = parser.add_argument_group(
        "context extension", "megatron_cream; --seq-length is the trained window N"
    )
    add = group.add_argument
    add("--target-length", type=int, help="window T to reach (default: --seq-length)")
    add("--original-length", type=int, help="window before (default: --seq-length)")
    add(
        "--position-strategy",
        choices=tuple(STRATEGIES),
        help="where training tokens pretend to stand (default: cream if T is longer than N)",
    )
    add("--position-seed", type=int, help="seed of the positions (default: --seed)")
    for strategy in STRATEGIES.values():
        for name, option in strategy.declared().items():
            add(strategy.flag(name), **option.argument())
    add("--plain-share", type=float, default=0.0, help="share of samples at plain positions")
    add(
        "--mixed-windows",
        action="store_true",
        help="samples within --original-length turn by the model's own RoPE; exported as longrope",
    )
    add(
        "--rope-interpolation",
        choices=tuple(SCALINGS),
        help="default: that of a run that is resumed; rope-theta if that is given; linear on "
        "--rope-base-config; yarn if T is longer than --original-length",
    )
    add("--rope-factor", type=float, help="default: T / --original-length")
    add_rope_flags(add)
    add(
        "--rope-base-config",
        help="config.json of a base model whose RoPE is scaled already; linear and ntk go on top",
    )
    add("--label-rule", choices=LABEL_RULES, default="true-next", help="targets at chunk borders")
    add(
        "--sample-unit",
        choices=SAMPLE_UNITS,
        help=f"what a sample reads from (default: {DEFAULT_UNIT}; that of a run that is resumed)",
    )
    for extra in extras():
        extra.add_flags(add)
    add("--cpu", action="store_true", help="run Megatron's trainer on a machine with no GPU")
    return parser


def extension_from_args(args: Namespace) -> ExtensionConfig:
    """Return the settings that parsed arguments make.

    Raises:
        UserError: lengths, strategy and interpolation that do not go together.
    """
    if args.seq_length is None:
        raise UserError("--seq-length is missing: it is the trained window N in tokens")
    train = args.seq_length
    target = train if args.target_length is None else args.target_length
    original = train if args.original_length is None else args.original_length
    if original < 1:
        raise UserError(f"--original-length is {original}: it must be at least 1 token")
    factor = target / original if args.rope_factor is None else args.rope_factor
    strategy = args.position_strategy or ("cream" if target > train else "full")
    extension = ExtensionConfig(
        train_length=train,
        target_length=target,
        original_length=original,
        position_strategy=strategy,
        position_seed=args.seed if args.position_seed is None else args.position_seed,
        position_options=_position_options(args, strategy, train, target),
        rope_interpolation=_interpolation(args, longer=target > original),
        rope_factor=max(factor, 1.0) if args.rope_factor is None else factor,
        rotary_base=float(args.rotary_base),
        rope_theta=args.rope_theta,
        rope_options=options_from_args(args),
        rope_base=read_base(args.rope_base_config) if args.rope_base_config else None,
        label_rule=args.label_rule,
        sample_unit=args.sample_unit or DEFAULT_UNIT,
        plain_share=args.plain_share,
        mixed_windows=args.mixed_windows,
    )
    _validate_mixture(extension)
    if args.hidden_size is not None:
        extension.scaling(rotary_dim(args))  # lists of factors must fit the model's dimensions
    return extension


def _validate_mixture(extension: ExtensionConfig) -> None:
    """Refuse mixed windows of which one would never be trained.

    Raises:
        UserError: naming the flag that makes near samples, or far ones.
    """
    if not extension.mixed_windows or extension.sample_unit == "packed-documents":
        return
    train, window, share = extension.train_length, extension.original_length, extension.plain_share
    if train > window:
        raise UserError(
            f"--seq-length is {train}: with --mixed-windows some samples must stay within "
            f"--original-length, so it must be at most {window}, or --sample-unit packed-documents"
        )
    if not 0 < share < 1 or extension.position_strategy == "full":
        raise UserError(
            f"--plain-share is {share:g} with --position-strategy {extension.position_strategy}: "
            "--mixed-windows needs near samples and far ones, so it must be a share above 0 and "
            "below 1, with another strategy than full"
        )


def _position_options(args: Namespace, strategy: str, train: int, target: int) -> dict[str, Any]:
    """Return the strategy's own settings, those that are not given as it recommends them."""
    cls = strategy_class(strategy)
    found = {name: getattr(args, cls.setting(name), None) for name in cls.declared()}
    given = {name: value for name, value in found.items() if value is not None}
    return cls.recommended(train, target, given)


def _interpolation(args: Namespace, longer: bool) -> str:
    if args.rope_interpolation and scaling_class(args.rope_interpolation).evaluation_only:
        able = ", ".join(name for name, cls in SCALINGS.items() if not cls.evaluation_only)
        raise UserError(
            f"--rope-interpolation is {args.rope_interpolation!r}: its angles change with the "
            "length of every sequence, so it is for evaluation only (tools/evaluate.py); for "
            f"training it must be one of {able}"
        )
    if args.rope_interpolation:
        return args.rope_interpolation
    if args.rope_theta is not None:
        return "rope-theta"
    if not longer:
        return "none"
    return "yarn" if args.rope_base_config is None else "linear"  # yarn goes on no other scaling
