# SPDX-License-Identifier: Apache-2.0
"""Says what a run should take, from Megatron's arguments: seconds, MFU, and its checkpoints."""

from __future__ import annotations

import os
from argparse import Namespace

from megatron_cream.errors import UserError
from megatron_cream.planning.cost import GPUS, Gpu, product_share, step_time
from megatron_cream.planning.memory import GIB, RESERVE_GIB, SAVED, WEIGHT, peak_memory
from megatron_cream.planning.propose import Cluster, Plan
from megatron_cream.planning.report import duration
from megatron_cream.planning.stages import (
    layout_from_args,
    shape_from_args,
    tuning_from_args,
    workload_from_args,
)


def machine() -> tuple[str, Gpu, int]:
    """Return the kind of GPU that GPU_KIND names (h100 without it), and GPUS_PER_NODE (8).

    Raises:
        UserError: an unknown kind, or no number.
    """
    name, node = os.environ.get("GPU_KIND", "h100"), os.environ.get("GPUS_PER_NODE", "8")
    if name not in GPUS:
        raise UserError(f"GPU_KIND is {name!r}: it must be one of {', '.join(GPUS)}")
    if not node.isdecimal() or int(node) < 1:
        raise UserError(f"GPUS_PER_NODE is {node!r}: it must be the number of GPUs of a node")
    return name, GPUS[name], int(node)


def plan_of(args: Namespace, gpu: Gpu, node: int) -> tuple[Plan, float]:
    """Return the plan of the layout that the arguments have, and the MFU of its step."""
    shape, layout = shape_from_args(args), layout_from_args(args)
    work, tuning = workload_from_args(args), tuning_from_args(args)
    cluster = Cluster(args.world_size, gpu, gpu.memory, product_share(), node)
    step = step_time(shape, layout, work, gpu, cluster.mfu, node, tuning)
    plan = Plan(layout, work, peak_memory(shape, layout, work, tuning), step)
    return plan, plan.mfu(shape, cluster)


def expected_lines(args: Namespace) -> list[str]:
    """Return time, MFU and checkpoints of a run for a person; its model must be estimated."""
    name, gpu, node = machine()
    plan, mfu = plan_of(args, gpu, node)
    steps = args.train_iters or args.train_samples // args.global_batch_size
    step = plan.step.total
    time = f"{duration(step)} per step, MFU {100 * mfu:.1f} %, {steps} steps in "
    lines = [f"on {name} as planned: {time}{duration(steps * step)}"]
    needed, room = plan.memory.total / GIB, gpu.memory - RESERVE_GIB
    if needed > room:
        lines.append(f"warning: {needed:.1f} GiB are needed, {name} leaves {room:g} to fill")
    if not (args.save and args.save_interval):
        return lines
    saved = (WEIGHT if args.no_save_optim else SAVED) * shape_from_args(args).parameters / 1e9
    every = min(args.save_interval, steps)
    kept = f"all of the run have {-(-steps // every) * saved:,.0f} GB"
    if args.save_retain_interval:
        kept = "each is removed when the next one is whole, but for those of every "
        kept += f"{args.save_retain_interval} steps"
    rate = f"one every {every} steps is {saved / (every * step):.2f} GB/s"
    return [*lines, f"a checkpoint has {saved:,.0f} GB, {rate}; {kept}"]
