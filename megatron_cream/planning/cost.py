# SPDX-License-Identifier: Apache-2.0
"""Estimates operations, bytes on the wire and seconds per training step, by closed forms.

A step is the slowest stage's kernels for every micro-batch, the pipeline's idle ends, the
communication that nothing hides, and the pass over weights and gradients. Communication of tensor
parallelism, of the pipeline and of context parallelism is taken as not hidden at all, that of data
parallelism as hidden behind one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.parallel_layout import ParallelLayout, Workload
from megatron_cream.planning.memory import layer_matrices, stage_parameters
from megatron_cream.planning.models import MODELS


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do; published figures of the SXM parts.

    Attributes:
        memory: GiB that the driver leaves to programs, rounded down.
        tflops: dense bf16, TFLOP/s.
        memory_gbs: GB/s of its own memory.
        node_gbs: GB/s to the GPUs of its node, one way.
        network_gbs: GB/s to other nodes, one way.
    """

    memory: float
    tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float


GPUS = {
    "a100": Gpu(79, 312, 2039, 300, 25),
    "h100": Gpu(79, 989.4, 3350, 450, 50),
    "h200": Gpu(139, 989.4, 4800, 450, 50),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step.

    Attributes:
        kernels: of the slowest stage, for all micro-batches, recomputation included.
        bubble: the pipeline fills and empties.
        communication: tensor, context, pipeline and data parallelism, what is not hidden.
        update: gradients are added up and the optimizer passes over the weights.
    """

    kernels: float
    bubble: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.kernels + self.bubble + self.communication + self.update


def layer_flops(shape: ModelShape, seq_length: int) -> float:
    """Return the operations per token of one layer, forward and backward.

    6 for every weight, and 6 s a d for the causal half of attention, which grouped queries do not
    change: 12 L h s / 2 for the L layers of a model whose a d is h.
    """
    # Biases are additions: they are no part of the 6.
    bias = (shape.heads + 2 * shape.groups) * shape.head_dim if shape.qkv_bias else 0
    weights = layer_matrices(shape) - bias
    return 6.0 * weights + 6.0 * seq_length * shape.heads * shape.head_dim


def model_flops(shape: ModelShape, seq_length: int) -> float:
    """Return the operations per token of the model, forward and backward, without recomputation."""
    return shape.layers * layer_flops(shape, seq_length) + 6.0 * shape.vocabulary * shape.hidden


def measured_mfu() -> float:
    """Return the share of peak that kernels reached in this project's own measurement.

    docs/training.md: 4 layers of Llama-2-7B and its head, micro-batch 4 of 4096 tokens, forward
    and backward on one H200 in 176.62 ms, CREAM positions through the fused RoPE.
    """
    shape = MODELS["llama-2-7b"]
    flops = 4 * layer_flops(shape, 4096) + 6.0 * shape.vocabulary * shape.hidden
    return flops * 4 * 4096 / 176.62e-3 / (GPUS["h200"].tflops * 1e12)


def step_time(
    shape: ModelShape, layout: ParallelLayout, work: Workload, gpu: Gpu, mfu: float, node: int = 8
) -> StepTime:
    """Return the seconds per step on ``layout``.

    Args:
        mfu: share of ``gpu.tflops`` that kernels reach.
        node: GPUs of a node.
    """
    batches = layout.micro_batches(work)
    one = max(_stage_flops(shape, layout, work)) / (gpu.tflops * 1e12 * mfu)
    # --overlap-grad-reduce and --overlap-param-gather hide them behind one micro-batch.
    replicas = max(0.0, replica_seconds(shape, layout, gpu, node) - one)
    return StepTime(
        kernels=batches * one,
        bubble=(layout.pipeline - 1) * one,
        communication=activation_seconds(shape, layout, work, gpu, node) + replicas,
        update=_update(shape, layout, batches, gpu),
    )


def _stage_flops(shape: ModelShape, layout: ParallelLayout, work: Workload) -> list[float]:
    """Operations of one GPU of each stage for one micro-batch."""
    tokens = work.seq_length * work.micro_batch / (layout.context * layout.tensor)
    again = 4 / 3 if layout.recompute else 1.0
    layer = layer_flops(shape, work.seq_length) * again
    flops = [len(layers) * layer for layers in layout.stages(shape.layers)]
    flops[-1] += 6.0 * shape.vocabulary * shape.hidden
    return [f * tokens for f in flops]


def activation_seconds(
    shape: ModelShape, layout: ParallelLayout, work: Workload, gpu: Gpu, node: int = 8
) -> float:
    """Return the seconds in which a GPU of the fullest stage sends activations in a step.

    Ring algorithms: n ranks that gather or scatter B bytes send (n - 1) / n of B each. Ranks are
    numbered tensor parallel first, then context, data and pipeline, as Megatron does.
    """
    layers = max(len(stage) for stage in layout.stages(shape.layers))
    tokens = work.seq_length * work.micro_batch / layout.context
    hidden = 2.0 * tokens * shape.hidden
    # A layer gathers twice and scatters twice each way, and gathers twice more for the weights.
    passes = 14 if layout.recompute else 10
    tensor = layers * passes * hidden * (layout.tensor - 1) / layout.tensor
    # Keys and values go round the ring, again in the backward pass, and their gradients with them.
    values = 4.0 * tokens * shape.groups * shape.head_dim / layout.tensor
    context = layers * 3 * values * (layout.context - 1)
    stages = 2 * hidden / layout.tensor if layout.pipeline > 1 else 0.0
    each = (
        tensor / _speed(gpu, layout.tensor, node)
        + context / _speed(gpu, layout.tensor * layout.context, node)
        + stages / _speed(gpu, layout.gpus, node)
    )
    return layout.micro_batches(work) * each


def replica_seconds(shape: ModelShape, layout: ParallelLayout, gpu: Gpu, node: int = 8) -> float:
    """Return the seconds in which a GPU scatters fp32 gradients and gathers bf16 weights."""
    replicas = layout.context * layout.data
    parameters = max(stage_parameters(shape, layout, s) for s in range(layout.pipeline))
    sent = (4 + 2) * parameters * (replicas - 1) / replicas
    return sent / _ring_speed(gpu, layout.tensor, layout.tensor * replicas, node)


def _speed(gpu: Gpu, ranks: int, node: int) -> float:
    """Bytes per second between neighbours of a group that spans ``ranks`` consecutive ranks."""
    return 1e9 * (gpu.node_gbs if ranks <= node else gpu.network_gbs)


def _ring_speed(gpu: Gpu, stride: int, ranks: int, node: int) -> float:
    """Bytes per second of a collective's rings over every ``stride``-th of ``ranks`` ranks.

    A group with k members in a node leaves it through their k network cards, one ring each. The
    links of the node bound it, and every ring passes through them.
    """
    if ranks <= node:
        return 1e9 * gpu.node_gbs
    members = max(1, node // stride)
    return 1e9 * min(gpu.node_gbs, members * gpu.network_gbs)


def _update(shape: ModelShape, layout: ParallelLayout, batches: int, gpu: Gpu) -> float:
    """Seconds in which weights and gradients go through the GPU's memory.

    Bytes per parameter: each micro-batch's gradient is read (2) and added up in fp32 (8); once a
    step their norm is taken (4), and of this rank's share gradient, copy and moments are read (16)
    and copy, moments and weight written (14).
    """
    parameters = max(stage_parameters(shape, layout, s) for s in range(layout.pipeline))
    share = 30 / (layout.data * layout.context)
    return parameters * (10 * batches + 4 + share) / (gpu.memory_gbs * 1e9)
