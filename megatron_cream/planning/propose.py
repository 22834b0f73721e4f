# SPDX-License-Identifier: Apache-2.0
"""Proposes the fastest layout that fits, and names what would fit where none does."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
from megatron_cream.planning.cost import Gpu, StepTime, model_flops, step_time
from megatron_cream.planning.models import GIB, BaseModel, StageMemory, peak_memory

LARGEST_SEARCH = 65536
"""GPUs up to which a smallest cluster is looked for."""

SHORTEST_SLICE = 4096
"""Tokens of a sample that context parallelism leaves a rank with at least.

Below it a rank computes attention faster than the keys and values of its neighbours arrive.
"""


@dataclass(frozen=True)
class Cluster:
    """What there is to run on.

    Attributes:
        gpus: GPUs in all.
        gpu: what each can do.
        memory: GiB of each that a plan may fill: its own, less what is reserved.
        mfu: share of ``gpu.tflops`` that bf16 matrix products reach.
        gpus_per_node: GPUs that are joined by fast links.
    """

    gpus: int
    gpu: Gpu
    memory: float
    mfu: float
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Plan:
    """A layout and what a step on it takes.

    Attributes:
        memory: of the stage that needs most.
        step: seconds by part.
    """

    layout: ParallelLayout
    work: Workload
    memory: StageMemory
    step: StepTime

    def seconds(self, tokens: int) -> float:
        """Return the seconds of training on ``tokens`` tokens."""
        return tokens / self.work.tokens * self.step.total

    def mfu(self, shape: ModelShape, cluster: Cluster) -> float:
        """Return the share of the cluster's peak that the whole step reaches."""
        flops = model_flops(shape, self.work.seq_length) * self.work.tokens
        return flops / (self.step.total * cluster.gpus * cluster.gpu.tflops * 1e12)


def propose(
    shape: BaseModel,
    cluster: Cluster,
    work: Workload,
    fixed: dict[str, int] | None = None,
    tuning: Tuning = MEGATRON_DEFAULTS,
    micro_batches: Sequence[int] = (),
) -> Plan:
    """Return the layout of parallelism with the shortest step among those that fit the memory.

    Args:
        shape: the model, its sizes.
        cluster: GPUs in all and per node, memory in GiB, the share of their peak that is reached.
        work: lengths in tokens and batch sizes of a step.
        fixed: sizes that are given: ``tensor``, ``pipeline``, ``context``, ``virtual``, ``expert``.
        tuning: options of the run that change its speed.
        micro_batches: sizes to try beside that of ``work``.

    Returns:
        The layout, its memory per GPU in bytes and its time per step in seconds, both estimated.

    Raises:
        UserError: none divides evenly, or none fits; names what would.
    """
    sizes = sorted({work.micro_batch, *micro_batches})
    works = [replace(work, micro_batch=size) for size in sizes]
    tried = [found for one in works for found in _layouts_tried(shape, cluster, one, fixed, tuning)]
    if not tried:
        raise UserError(_nothing_divides(shape, cluster, work, fixed))
    speed = (cluster.gpu, cluster.mfu, cluster.gpus_per_node, tuning)
    fitting = [
        Plan(layout, one, memory, step_time(shape, layout, one, *speed))
        for layout, one, memory in tried
        if memory.total <= cluster.memory * GIB
    ]
    if not fitting:
        least = min(tried, key=lambda found: found[2].total)
        raise UserError(_nothing_fits(shape, cluster, work, fixed, least, tuning))
    # Ties go to the layout that splits the model less.
    return min(fitting, key=lambda p: (p.step.total, p.layout.tensor * p.layout.pipeline))


_Tried = tuple[ParallelLayout, Workload, StageMemory]


def _layouts_tried(
    shape: BaseModel,
    cluster: Cluster,
    work: Workload,
    fixed: dict[str, int] | None,
    tuning: Tuning,
) -> Iterator[_Tried]:
    """Yield layouts, with the memory of the stage that needs most."""
    for layout in layouts(shape, cluster.gpus, work, cluster.gpus_per_node, fixed):
        for one in (layout, _recompute_in_part(shape, cluster, layout, work, tuning)):
            if one is not None:
                yield one, work, peak_memory(shape, one, work, tuning)


def _recompute_in_part(
    shape: BaseModel, cluster: Cluster, layout: ParallelLayout, work: Workload, tuning: Tuning
) -> ParallelLayout | None:
    """Return ``layout`` with the fewest layers recomputed that fit, where it recomputes all."""

    def fits(layers: int) -> bool:
        some = replace(layout, recompute_layers=layers)
        return peak_memory(shape, some, work, tuning).total <= cluster.memory * GIB

    counts = (layout.layers_of(stage, shape.layers) for stage in layout.telling_stages)
    layers = max(counts) // layout.virtual
    if not layout.recompute or fits(0) or not fits(layers):
        return None
    fewest = bisect_left(range(layers), True, key=fits)
    return replace(layout, recompute_layers=fewest) if fewest < layers else None


def _nothing_divides(
    shape: BaseModel, cluster: Cluster, work: Workload, fixed: dict[str, int] | None
) -> str:
    given = "".join(f", {name} parallel size {size}" for name, size in (fixed or {}).items())
    return (
        f"--gpus is {cluster.gpus}{given}: it must be tensor x pipeline x context x data parallel "
        f"sizes with tensor at most {cluster.gpus_per_node} and dividing {shape.heads} heads and "
        f"{shape.groups} query groups, {shape.layers} layers split over the pipeline, and data "
        f"dividing --global-batch-size {work.global_batch} / --micro-batch-size {work.micro_batch}"
    )


def _nothing_fits(
    shape: BaseModel,
    cluster: Cluster,
    work: Workload,
    fixed: dict[str, int] | None,
    least: _Tried,
    tuning: Tuning,
) -> str:
    layout, _, memory = least
    more = fewest_gpus(shape, cluster, work, fixed, tuning)
    enough = f"; {more} such GPUs would do" if more else "; no number of such GPUs would do"
    return (
        f"{shape.name} at {work.seq_length} tokens does not fit on --gpus {cluster.gpus}: the "
        f"least is {memory.total / GIB:.1f} GiB per GPU ({layout}), and "
        f"{cluster.memory:g} of --gpu-memory are left to fill{enough}"
    )


def fewest_gpus(
    shape: BaseModel,
    cluster: Cluster,
    work: Workload,
    fixed: dict[str, int] | None = None,
    tuning: Tuning = MEGATRON_DEFAULTS,
) -> int | None:
    """Return the smallest doubling of the cluster that fits, or None."""
    gpus = cluster.gpus * 2
    while gpus <= LARGEST_SEARCH:
        if any(
            peak_memory(shape, layout, work, tuning).total <= cluster.memory * GIB
            for layout in layouts(shape, gpus, work, cluster.gpus_per_node, fixed)
        ):
            return gpus
        gpus *= 2
    return None


def layouts(
    shape: ModelShape,
    gpus: int,
    work: Workload,
    gpus_per_node: int = 8,
    fixed: dict[str, int] | None = None,
) -> Iterator[ParallelLayout]:
    """Yield every layout of exactly ``gpus`` GPUs that Megatron would run.

    Tensor parallelism stays inside a node and divides heads and query groups; samples are divided
    evenly; layers are too, or the first and last stage have fewer. Virtual stages need an even
    split and whole groups of as many micro-batches as there are stages.

    Args:
        fixed: sizes that are given: ``tensor``, ``pipeline``, ``context``, ``virtual``, ``expert``.
    """
    fixed = fixed or {}
    for tensor in _divisors(gpus):
        if tensor > gpus_per_node or not divides_heads(shape, tensor):
            continue
        for pipeline in _divisors(gpus // tensor):
            ends = uneven_ends(shape.layers, pipeline)
            if ends is None:
                continue
            for context in _divisors(gpus // (tensor * pipeline)):
                data = gpus // (tensor * pipeline * context)
                sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
                if any(fixed.get(name, size) != size for name, size in sizes.items()):
                    continue
                if not _divides_samples(work, context, data, "context" in fixed):
                    continue
                layout = ParallelLayout(tensor, pipeline, context, data, *ends)
                inner = product(
                    _virtual_stages(shape, layout, work),
                    _expert_sizes(shape, layout, gpus_per_node),
                )
                for virtual, expert in inner:
                    one = replace(layout, virtual=virtual, expert=expert)
                    given = {"virtual": virtual, "expert": expert}
                    if all(fixed.get(name, size) == size for name, size in given.items()):
                        yield one
                        yield replace(one, recompute=True)


def _expert_sizes(shape: ModelShape, layout: ParallelLayout, node: int) -> list[int]:
    """Return the numbers of ranks that a layer's experts can be spread over, within a node."""
    ranks = layout.gpus // layout.pipeline
    sizes = _divisors(shape.experts) if shape.experts else [1]
    return [size for size in sizes if ranks % size == 0 and size <= node]


def _virtual_stages(shape: ModelShape, layout: ParallelLayout, work: Workload) -> list[int]:
    """Return the numbers of virtual stages that a rank's layers can be divided into."""
    uneven = layout.first_layers is not None
    if layout.pipeline == 1 or uneven or layout.micro_batches(work) % layout.pipeline:
        return [1]
    return _divisors(shape.layers // layout.pipeline)


def divides_heads(shape: ModelShape, tensor: int) -> bool:
    """Say whether each tensor-parallel rank gets whole heads, query groups and an even MLP."""
    return not (shape.heads % tensor or shape.groups % tensor or shape.ffn % tensor)


def uneven_ends(layers: int, stages: int) -> tuple[int | None, int | None] | None:
    """Return layers of the first and last stage, (None, None) for an even split, None for none.

    Embedding and output layer cost about a layer each, so it is the ends that get fewer.
    """
    if stages > layers:
        return None
    if layers % stages == 0:
        return None, None
    middle = math.ceil(layers / stages)
    left = layers - middle * (stages - 2)
    if stages < 2 or left < 2:
        return None
    return left - left // 2, left // 2


def _divides_samples(work: Workload, context: int, data: int, given: bool) -> bool:
    if work.global_batch % (work.micro_batch * data):
        return False
    if context == 1:
        return True
    # Megatron's zigzag gives every rank one piece of each half.
    whole = work.seq_length % (2 * context) == 0
    return whole and (given or work.seq_length // context >= SHORTEST_SLICE)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
