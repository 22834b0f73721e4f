# SPDX-License-Identifier: Apache-2.0
"""Lists the parallel layouts that divide a model and a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.parallel_layout import ParallelLayout, Workload

VOCAB_MULTIPLE = 128
"""Megatron's --make-vocab-size-divisible-by; it pads to that times the tensor parallel size."""

SHORTEST_SLICE = 4096
"""Tokens of a sample that context parallelism leaves a rank with at least.

Below it a rank computes attention faster than the keys and values of its neighbours arrive.
"""


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """Return the rows of the embedding that Megatron makes for a tensor parallel size."""
    multiple = VOCAB_MULTIPLE * tensor
    return math.ceil(shape.vocabulary / multiple) * multiple


def layouts(
    shape: ModelShape,
    gpus: int,
    work: Workload,
    gpus_per_node: int = 8,
    fixed: dict[str, int] | None = None,
) -> Iterator[ParallelLayout]:
    """Yield every layout of exactly ``gpus`` GPUs that Megatron would run.

    Tensor parallelism stays inside a node and divides heads and query groups; samples are divided
    evenly; layers are too, or the first and last stage have fewer.

    Args:
        fixed: sizes that are given: ``tensor``, ``pipeline``, ``context``.
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
                if not sizes.items() >= fixed.items():
                    continue
                if not _divides_samples(work, context, data, "context" in fixed):
                    continue
                for recompute in (False, True):
                    yield ParallelLayout(
                        tensor, pipeline, context, data, *ends, recompute=recompute
                    )


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
