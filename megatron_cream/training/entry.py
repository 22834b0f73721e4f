# SPDX-License-Identifier: Apache-2.0
"""What every way to start a run shares: our flags, their checks, and Megatron's hooks.

``megatron_cream.pretrain`` is a script of its own; ``megatron_cream.launch`` runs another's.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron_cream.config import ExtensionConfig

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


def stand_in_if_asked() -> None:
    """Let the CPU stand in for the GPU if ``sys.argv`` has ``--cpu``; before megatron's import."""
    if "--cpu" in sys.argv[1:]:
        from megatron_cream.training import cpu

        cpu.install()
        sys.argv[1:1] = cpu.FLAGS


def parse(
    parse_and_validate_args: Callable[..., Namespace],
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
) -> Namespace:
    """Parse ``sys.argv`` with our flags and check all of it before a GPU is asked for.

    Args:
        parse_and_validate_args: Megatron's own function of that name.
        extra_args_provider: adds a script's own flags; it, and the rest, as Megatron's takes it.

    Raises:
        ValueError, FileNotFoundError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_args

    from megatron_cream.checkpoint.saved import SETTINGS_KEY, complete_arguments, keep_vocabulary
    from megatron_cream.checkpoint.starting import check_start
    from megatron_cream.training.megatron import megatrons_refusals

    provider = _ours_after(extra_args_provider)
    defaults = args_defaults or {}
    # Ours first: Megatron's own validation prints hundreds of lines that would bury an error.
    args = _with_defaults(parse_args(provider, ignore_unknown_args), defaults)
    from_checkpoint = args.use_checkpoint_args or defaults.get("use_checkpoint_args", False)
    if from_checkpoint:
        check_start(args)  # Megatron's validation reads it, without limits
    extension = None if from_checkpoint else check(args)
    with megatrons_refusals():
        args = parse_and_validate_args(provider, ignore_unknown_args, defaults)
    if from_checkpoint:
        complete_arguments(args)
    extension = extension or check(args)
    keep_vocabulary(args)
    # Micro-batches may hold different numbers of trained tokens (texts end, borders are masked);
    # averaging their averages would make the result depend on the layout.
    args.calculate_per_token_loss = True
    setattr(args, SETTINGS_KEY, extension.to_dict())
    return args


def _ours_after(provider: ArgumentsProvider | None) -> ArgumentsProvider:
    from megatron_cream.training.arguments import add_arguments

    return lambda parser: add_arguments(parser if provider is None else provider(parser))


def _with_defaults(args: Namespace, defaults: dict[str, Any]) -> Namespace:
    """Fill what is not given, as Megatron's validation will."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def check(args: Namespace) -> ExtensionConfig:
    """Check flags, datasets and checkpoints, and return the settings of the extension."""
    from megatron_cream.training import arguments, checks, clex, cpu, hybrid

    arguments.refuse_unsupported(args)
    hybrid.refuse_pattern(args)
    if args.cpu:
        cpu.refuse_unserved(args)
    extension = arguments.extension_from_args(args)
    if extension.draws_scales:
        clex.refuse_unserved(args)
    checks.check_packages(args)
    checks.check_datasets(args, extension)
    checks.check_checkpoint(args, extension)
    return extension


def ready(args: Namespace, config: Any) -> None:
    """Put our hooks and scalars into Megatron, and say on rank 0 what this run will do.

    The last thing before ``megatron.training.pretrain``.
    """
    from megatron_cream.checkpoint import checksums
    from megatron_cream.checkpoint.saved import SETTINGS_KEY
    from megatron_cream.training import hooks, report, scalars
    from megatron_cream.training.megatron import answer_for_dataset_helpers, keep_save_results_here

    answer_for_dataset_helpers()
    if args.cpu:
        keep_save_results_here()
    checksums.serve_saves()
    extension = ExtensionConfig.from_dict(getattr(args, SETTINGS_KEY))
    hooks.hook_into(config, args, extension)
    scalars.write_scalars(args, extension)
    if args.rank == 0:
        print(report.start_block(args, extension), flush=True)
