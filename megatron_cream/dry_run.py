# SPDX-License-Identifier: Apache-2.0
"""Checks a command before there is a cluster: its flags, stages, memory, time and positions.

    WORLD_SIZE=64 python -m megatron_cream.dry_run <the flags of megatron_cream.pretrain>

Takes the flags of a run unchanged, on any machine, without its data and checkpoints. The number of
GPUs comes from WORLD_SIZE, as torchrun sets it, their kind from GPU_KIND (h100) and how many a node
has from GPUS_PER_NODE (8). Every script of examples/ does this on --dry-run.

Quicker than ``planning.stages.check_stages``, which builds every rank of a copy of the model: here
the first, a middle and the last stage are built, by one rank each, and compared with the closed
forms of ``planning.models``.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.mcore import fake_world
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.mcore.fake_world import RankView, rank_view
from megatron_cream.planning.models import stage_parameters
from megatron_cream.planning.stages import (
    check_ends,
    expected_lines,
    layout_from_args,
    shape_from_args,
    stage_line,
    why_not_estimated,
)
from megatron_cream.positions import SampleLayout
from megatron_cream.positions.coverage import Tally

_SHOWN = 3  # samples whose positions are printed
_PIECES = 6  # of each


def main() -> None:
    """Print what the run will be; bad input ends in one line and exit status 2."""
    # Megatron says on import which GPU packages are missing: none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning)
    with one_line_errors():
        print("\n".join(lines(dry_run(sys.argv[1:], world_size()))))


def world_size() -> int:
    """Return the number of GPUs that WORLD_SIZE names; 1 without it.

    Raises:
        UserError: it is not a positive whole number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}: it must be the number of GPUs, at least 1")
    return int(text)


@dataclass(frozen=True)
class DryRun:
    """What was parsed, built and drawn.

    Attributes:
        views: one rank of the first, a middle and the last pipeline stage.
        layouts: of the samples of the first step.
        args: Megatron's arguments.
        extension: our settings.
    """

    views: tuple[RankView, ...]
    layouts: tuple[SampleLayout, ...]
    args: Namespace
    extension: ExtensionConfig


def dry_run(argv: Sequence[str], world_size: int) -> DryRun:
    """Parse flags of ``megatron_cream.pretrain``, build three stages, draw a step's positions.

    Raises:
        UserError: naming the flag, or the stage and what it holds.
        RuntimeError: this process has process groups, or a GPU in use.
    """
    fake_world.prepare()
    args, extension = fake_world.parse(argv, world_size)
    ranks = fake_world.stage_ranks(args)
    last = len(ranks) - 1
    views = [rank_view(args, extension, ranks[stage]) for stage in sorted({0, last // 2, last})]
    for view in views:
        _check(args, extension, view, last)
    strategy = extension.strategy()
    layouts = [strategy.layout(extension.position_seed, i) for i in range(args.global_batch_size)]
    for index, layout in enumerate(layouts):
        _check_positions(index, layout)
    return DryRun(tuple(views), tuple(layouts), args, extension)


def _check(args: Namespace, extension: ExtensionConfig, view: RankView, last: int) -> None:
    check_ends(view, last)
    if why_not_estimated(args) is not None:
        return  # the closed forms are of other models
    shape, layout = shape_from_args(args), layout_from_args(args)
    layers = [index + 1 for index in layout.stages(shape.layers)[view.stage]]
    parameters = stage_parameters(shape, layout, view.stage)
    # Every virtual stage has a copy of the frequencies that RoPE trains.
    parameters += layout.virtual * extension.scaling(rotary_dim(args)).trained_size
    if list(view.layers) != layers or view.parameters != parameters:
        raise UserError(
            f"stage {view.stage} has {view.parameters} parameters in layers {view.layers}: it "
            f"must have {parameters} in {layers}"
        )


def _check_positions(index: int, layout: SampleLayout) -> None:
    ids = layout.position_ids
    if len(ids) != layout.train_length or (np.diff(ids) < 1).any():
        raise UserError(f"sample {index} has {len(ids)} positions that do not all increase")
    if ids[0] < 0 or ids[-1] >= layout.target_length:
        raise UserError(
            f"sample {index} stands at {ids[0]}..{ids[-1]}: it must stay below --target-length "
            f"{layout.target_length}"
        )


def lines(run: DryRun) -> list[str]:
    """Return layout, memory and positions for a person."""
    args, extension = run.args, run.extension
    layout = layout_from_args(args)
    micro = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    reason = why_not_estimated(args)
    return [
        f"{args.world_size} GPUs: {layout}; a step of {args.global_batch_size} samples is {micro} "
        f"micro-batches of {args.micro_batch_size}, {args.train_iters} steps",
        *(stage_line(args, view) for view in run.views),
        *(expected_lines(args) if reason is None else [f"nothing is estimated: {reason}"]),
        *_position_lines(run),
        f"RoPE by positions: {extension.describe_rope(rotary_dim(args))}",
        "dry run: flags, stages and positions are right; data and checkpoints were not looked at",
    ]


def _position_lines(run: DryRun) -> list[str]:
    extension, tally = run.extension, Tally(run.extension.target_length)
    for layout in run.layouts:
        tally.add(layout)
    head = (
        f"positions of a step, [{len(run.layouts)}, {extension.train_length}]: "
        f"{extension.position_strategy} within {extension.target_length}, seed "
        f"{extension.position_seed}, {100 * tally.covered:.1f} % of the distances"
    )
    shown = run.layouts[:_SHOWN]
    return [head, *(f"  sample {i}: {_pieces(layout)}" for i, layout in enumerate(shown))]


def _pieces(layout: SampleLayout) -> str:
    runs = layout.runs()
    if runs is None:
        ids = layout.position_ids
        return f"{', '.join(map(str, ids[:3]))} ... {', '.join(map(str, ids[-3:]))}"
    pieces = [f"{start}..{start + length - 1}" for start, length in runs]
    more = f" and {len(pieces) - _PIECES} more" if len(pieces) > _PIECES else ""
    return ", ".join(pieces[:_PIECES]) + more


if __name__ == "__main__":
    main()
