# SPDX-License-Identifier: Apache-2.0
"""Builds a layout rank by rank in one process, checks its stages, and says what a run will take."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cream.checkpoint.model_shape import ModelShape, shape_from_arguments
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore import fake_world
from megatron_cream.mcore.argument_table import ARGUMENTS, flag_of, values
from megatron_cream.mcore.fake_world import RankView, rank_view
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
from megatron_cream.planning.cost import GPUS, Gpu, product_share, step_time
from megatron_cream.planning.models import (
    GIB,
    RESERVE_GIB,
    SAVED,
    WEIGHT,
    peak_memory,
    stage_memory,
)
from megatron_cream.planning.propose import Cluster, Plan
from megatron_cream.planning.report import duration


@dataclass(frozen=True)
class StagesCheck:
    """A layout that was built whole and is right.

    Attributes:
        views: the ranks of the first copy of the model, and the last rank of the world.
        parameters: of the model, its vocabulary padded as the layout pads it.
        args: Megatron's arguments.
        extension: our settings.
    """

    views: tuple[RankView, ...]
    parameters: int
    args: Namespace
    extension: ExtensionConfig

    def stage(self, index: int) -> RankView:
        """Return the rank of pipeline stage ``index`` that holds most."""
        return max((v for v in self.views if v.stage == index), key=lambda v: v.parameters)


def check_stages(argv: Sequence[str], world_size: int) -> StagesCheck:
    """Build the layout that flags of ``megatron_cream.pretrain`` describe, and check it.

    No dataset, checkpoint or GPU is touched; process groups are fake. Checked: flags parse and are
    valid; every layer is built once; the embedding is on the first stage alone and the output
    layer on the last; every rank turns its positions by our rotary, with our frequencies; the
    parameters of the ranks add up to those of the model built on one rank; a rank of another copy
    holds as many.

    Raises:
        UserError: naming the flag, or the rank and what it holds.
        RuntimeError: this process has process groups, or a GPU in use.
    """
    fake_world.prepare()
    args, extension = fake_world.parse(argv, world_size)
    ranks = fake_world.model_ranks(args)
    views = [rank_view(args, extension, rank) for rank in ranks]
    whole = rank_view(fake_world.one_rank(args), extension, 0)
    _check_layers(views, whole)
    _check_parameters(views, whole)
    if world_size - 1 not in ranks:
        views.append(rank_view(args, extension, world_size - 1))
        _check_copy(views)
    return StagesCheck(tuple(views), whole.parameters, args, extension)


def _check_layers(views: Sequence[RankView], whole: RankView) -> None:
    """Compare the stages with the whole model.

    Raises:
        UserError: a layer is missing or built twice, or a table is where it should not be.
    """
    last = max(view.stage for view in views)
    for view in views:
        if view.layers != views_of_stage(views, view.stage)[0].layers:
            raise UserError(f"rank {view.rank} has layers {view.layers}: its stage has others")
        check_ends(view, last)
    built = [n for stage in range(last + 1) for n in views_of_stage(views, stage)[0].layers]
    if sorted(built) != sorted(whole.layers):
        raise UserError(f"the stages have layers {sorted(built)}: the model has {whole.layers}")


def check_ends(view: RankView, last: int) -> None:
    """Check that the first stage alone has the embedding, and the stage ``last`` the output layer.

    Raises:
        UserError: naming the rank and what it has.
    """
    if view.embedding != (view.stage == 0) or view.output != (view.stage == last):
        raise UserError(
            f"rank {view.rank} of stage {view.stage} has embedding: {view.embedding}, output "
            f"layer: {view.output}; the first stage must have the one, the last the other"
        )


def views_of_stage(views: Sequence[RankView], stage: int) -> list[RankView]:
    """Return the views of one pipeline stage."""
    return [view for view in views if view.stage == stage]


def _check_parameters(views: Sequence[RankView], whole: RankView) -> None:
    counted = sum(view.counted for view in views)
    if counted != whole.parameters:
        raise UserError(
            f"{len(views)} ranks hold {counted} parameters of the model: it has {whole.parameters}"
        )


def _check_copy(views: Sequence[RankView]) -> None:
    """Compare the last view, of another copy of the model, with the first copy's last rank."""
    *first, copy = views
    twins = views_of_stage(first, copy.stage)
    if (copy.parameters, copy.layers) not in {(v.parameters, v.layers) for v in twins}:
        raise UserError(
            f"rank {copy.rank} holds {copy.parameters} parameters in layers {copy.layers}: the "
            f"first copy has {twins[-1].parameters} in {twins[-1].layers}"
        )


def stage_lines(check: StagesCheck) -> list[str]:
    """Return a line for each pipeline stage that was built, and what they add up to.

    Memory is planned for the parameters that were built; where flags are outside what the
    estimates hold for, a line says which.
    """
    args, reason = check.args, why_not_estimated(check.args)
    stages = range(args.pipeline_model_parallel_size)
    lines = [stage_line(args, check.stage(index)) for index in stages]
    if reason is not None:
        lines.append(f"memory is not estimated: {reason}")
    lines.append(
        f"{len(check.views)} of {args.world_size} ranks built: the {check.parameters:,} parameters "
        f"of the model add up (vocabulary padded to {args.padded_vocab_size}); RoPE by positions, "
        f"{check.extension.rope_interpolation}, factor {check.extension.rope_factor:g}"
    )
    return lines


def stage_line(args: Namespace, view: RankView) -> str:
    """Return what a rank of a pipeline stage holds, with its memory where that is estimated."""
    text = f"stage {view.stage}: layers {_numbers(view.layers)}"
    text += ", embedding" if view.embedding else ""
    text += ", output layer" if view.output else ""
    text += f"; {view.parameters:,} parameters per GPU"
    if why_not_estimated(args) is None:
        text += f", {_stage_gib(args, view.stage, view.parameters):.1f} GiB"
    return text


def _stage_gib(args: Namespace, stage: int, parameters: int) -> float:
    shape, layout, work = shape_from_args(args), layout_from_args(args), workload_from_args(args)
    return stage_memory(shape, layout, work, stage, parameters, tuning_from_args(args)).total / GIB


def _numbers(layers: tuple[int, ...]) -> str:
    """Layers as ranges: virtual stages have several."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def why_not_estimated(args: Namespace) -> str | None:
    """Name the first flag under which memory is not estimated, or return None."""
    for name, needed in values("estimated").items():
        value, off = getattr(args, name, None), ARGUMENTS[name].off
        if value != needed and off:
            return f"{off} is missing, estimates are for models with it"
        if value != needed:
            wanted = "models without" if needed is None else needed
            return f"{flag_of(name)} is {value}, estimates are for {wanted}"
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        return "--sequence-parallel is missing, estimates are for tensor parallelism with it"
    if args.recompute_method == "uniform" and args.recompute_num_layers != 1:
        return f"--recompute-num-layers is {args.recompute_num_layers}, estimates are for 1"
    if args.fp8 and (args.fp8_param_gather or args.fp8_recipe not in ("tensorwise", "delayed")):
        return "estimates of FP8 are for --fp8-recipe tensorwise without --fp8-param-gather"
    if args.num_experts and args.expert_tensor_parallel_size != 1:
        size = args.expert_tensor_parallel_size
        return f"--expert-tensor-parallel-size is {size}, estimates are for 1"
    if args.num_experts and args.moe_layer_freq != 1:
        return f"--moe-layer-freq is {args.moe_layer_freq}, estimates are for 1"
    modules = set(args.recompute_modules or ()) - {"core_attn"}
    if args.recompute_granularity == "selective" and modules:
        return f"--recompute-modules is {' '.join(sorted(modules))}, estimates are for core_attn"
    return _why_no_groups(args)


def _why_no_groups(args: Namespace) -> str | None:
    """Name what makes the groups of micro-batches of virtual stages uneven, or return None."""
    if args.virtual_pipeline_model_parallel_size is None:
        return None
    if args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers:
        return "stages are uneven, estimates of virtual stages are for even ones"
    batches = layout_from_args(args).micro_batches(workload_from_args(args))
    stages, group = args.pipeline_model_parallel_size, args.microbatch_group_size_per_vp_stage
    if batches % stages:
        return f"{batches} micro-batches per step are no multiple of {stages} stages"
    if group not in (None, stages):
        flag = flag_of("microbatch_group_size_per_vp_stage")
        return f"{flag} is {group}, estimates are for {stages}"
    return None


def tuning_from_args(args: Namespace) -> Tuning:
    """Return the options of speed and memory.

    The precision-aware optimizer keeps an fp32 master copy as the 16 bits that the bf16 weight
    lacks, and its moments as --exp-avg-dtype and --exp-avg-sq-dtype say.
    """
    optimizer = MEGATRON_DEFAULTS.optimizer_bytes
    if args.use_precision_aware_optimizer:
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
        optimizer = _PRECISION_AWARE_COPY + moments
    return Tuning(
        args.fp8 is not None,
        args.tp_comm_overlap,
        args.gradient_accumulation_fusion,
        2 if args.grad_reduce_in_bf16 else 4,
        optimizer,
        getattr(args, "dual_chunk", None) is not None,
    )


_PRECISION_AWARE_COPY = 2
"""Bytes: fp16, or the remainder of fp32 (Megatron's store_param_remainders, on by default)."""


def shape_from_args(args: Namespace) -> ModelShape:
    """Return the shape of the model; its vocabulary is the padded one."""
    return dataclasses.replace(shape_from_arguments(args), vocabulary=args.padded_vocab_size)


def layout_from_args(args: Namespace) -> ParallelLayout:
    """Return the layout; Megatron has computed the data parallel size."""
    return ParallelLayout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        data=args.data_parallel_size,
        first_layers=args.decoder_first_pipeline_num_layers,
        last_layers=args.decoder_last_pipeline_num_layers,
        recompute=args.recompute_granularity == "full",
        recompute_layers=args.recompute_num_layers if args.recompute_method == "block" else None,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        expert=args.expert_model_parallel_size,
    )


def workload_from_args(args: Namespace) -> Workload:
    """Return what a step takes in."""
    return Workload(args.seq_length, args.global_batch_size, args.micro_batch_size)


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
