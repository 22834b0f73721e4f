# SPDX-License-Identifier: Apache-2.0
"""Estimates operations, bytes on the wire and seconds per training step, by closed forms.

A step is the slowest stage's micro-batches one after another, the pipeline's idle ends, what is
exposed of data parallelism, and the pass over gradients and weights. A micro-batch takes its
matrix products, its attention, what its other kernels read and write, and what is exposed of
tensor, context and pipeline parallelism; it takes no less than the host needs to launch its
kernels. The constants below are all there are; ``published.json`` has what they are held to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
from megatron_cream.planning.models import (
    MODELS,
    WEIGHT,
    dense_parameters,
    expert_matrices,
    expert_parameters,
    largest_stage,
    layer_matrices,
)

ATTENTION_SHARE = 0.50
"""Of the bf16 peak: causal flash attention, forward and backward, per operation of the causal half.

FlashAttention-3 reports up to 740 TFLOP/s on an H100 forward (arXiv:2407.08608); backward, causal
and short samples have less. Calibrated on Llama-3-8B and 70B at 8192 tokens.
"""

DUAL_CHUNK = {32768: 1.223, 65536: 1.059, 131072: 1.002}
"""Time of dual chunk attention over plain, forward and backward, by tokens of a sample.

Measured on one H200: tools/benchmark_dual_chunk.py, docs/attention.md.
"""

FP8_SPEEDUP = 1.63
"""FP8 matrix products over bf16 ones. Calibrated on Llama-2-70B, TP4 PP4 VP20, on 64 H100."""

MEMORY_SHARE = 0.85
"""Of a GPU's memory bandwidth that kernels without products reach; STREAM-like copies have 0.9."""

NODE_SHARE, NETWORK_SHARE = 0.7, 0.8
"""Of a link's rate that a collective of tens of MB reaches, as nccl-tests print it (bus bandwidth).

Within a node of H100s 250 to 350 of 450 GB/s; to other nodes 40 of 50.
"""

OVERLAP = 0.5
"""Part of what is sent beside kernels that is exposed all the same: both slow each other.

For data parallelism and interleaved stages. Calibrated on Llama-2-7B, FP8, on 8 H100, whose step
has 4 micro-batches, beside the same model with 16.
"""

RING_LAUNCHES = 0.46
"""What each further rank of a context ring adds to the host's launches of a layer, as a share.

Calibrated on one row, 8 layers of Llama-2-7B at CP2 on two H200s: 10.5 ms per layer to 7.2 at TP2.
That it is launches is inferred, not profiled: twice the tokens take 1.26 times as long there.
"""

PIECE_TOKENS = 1024
"""Tokens of the smallest piece that --tp-comm-overlap gains by: 8 tiles of 128 of a product."""

LOGIT_BYTES = 30
"""Read and written per logit: bf16, its fp32 copy, maximum, softmax, and the way back."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do; published figures of the SXM parts.

    Attributes:
        memory: GiB that the driver leaves to programs, rounded down.
        tflops: dense bf16, TFLOP/s.
        memory_gbs: GB/s of its own memory.
        node_gbs: GB/s to the GPUs of its node, one way.
        network_gbs: GB/s to other nodes, one way.
        fp8: it multiplies in FP8.
        launch_ms: its host's time to launch one layer, forward and backward, of one micro-batch.
            3.1 ms are those of Llama-2-7B at TP8, reported to take 80 % longer than its kernels,
            1.7 ms per layer; the shortest published row has 6.8 ms per layer.
    """

    memory: float
    tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    fp8: bool = True
    launch_ms: float = 3.1

    @property
    def memory_rate(self) -> float:
        """Bytes per second that kernels reach."""
        return 1e9 * self.memory_gbs * MEMORY_SHARE

    @property
    def node_rate(self) -> float:
        """Bytes per second that collectives reach within a node."""
        return 1e9 * self.node_gbs * NODE_SHARE

    @property
    def network_rate(self) -> float:
        """Bytes per second that one network card reaches."""
        return 1e9 * self.network_gbs * NETWORK_SHARE


GPUS = {
    "a100": Gpu(79, 312, 2039, 300, 25, fp8=False),
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
        launches: the GPU waits for the host, which has launched no kernel yet.
    """

    kernels: float
    bubble: float
    communication: float
    update: float
    launches: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.kernels + self.bubble + self.communication + self.update + self.launches


def layer_flops(shape: ModelShape, seq_length: int) -> float:
    """Return the operations per token of one layer, forward and backward.

    6 for every weight that a token meets, and 6 s a d for the causal half of attention, which
    grouped queries do not change: 12 L h s / 2 for the L layers of a model whose a d is h.
    """
    return _product_flops(shape) + 6.0 * seq_length * shape.heads * shape.head_dim


def _product_flops(shape: ModelShape) -> float:
    # Biases are additions: they are no part of the 6.
    bias = (shape.heads + 2 * shape.groups) * shape.head_dim if shape.qkv_bias else 0
    flops = 6.0 * (layer_matrices(shape) - bias)
    if shape.experts and shape.experts_per_token:
        routed = expert_matrices(shape) * shape.experts_per_token / shape.experts
        flops += 6.0 * (routed + shape.experts * shape.hidden)
    return flops


def model_flops(shape: ModelShape, seq_length: int) -> float:
    """Return the operations per token of the model, forward and backward, without recomputation."""
    return shape.layers * layer_flops(shape, seq_length) + _head_flops(shape)


def _head_flops(shape: ModelShape) -> float:
    return 6.0 * shape.vocabulary * shape.hidden


def layer_traffic(shape: ModelShape, fp8: bool = False) -> float:
    """Return the bytes per token that a layer's kernels without products read and write.

    In bf16, forward and backward: two norms 20 h, two residual additions 24 h, rotation of
    queries and keys 8 (a + g) d, the MLP's gate 16 f. FP8 reads each product's input and
    gradient of its output, and writes them and their transposes: 4 bytes per value. A token that
    goes to k experts has k gates, and is sorted by expert and back: 8 (1 + k) h.
    """
    gates = (shape.experts_per_token or 1) * shape.ffn
    traffic = 44.0 * shape.hidden + 8 * (shape.heads + shape.groups) * shape.head_dim + 16 * gates
    if shape.experts_per_token:
        traffic += 8 * (1 + shape.experts_per_token) * shape.hidden
    if fp8:
        heads, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        inputs = 2 * shape.hidden + heads + gates
        gradients = heads + 2 * keys + 2 * shape.hidden + 2 * gates
        traffic += 4.0 * (inputs + gradients)
    return traffic


def dual_chunk_factor(tokens: int) -> float:
    """Return the time of dual chunk attention over plain, for a sample of ``tokens``.

    Between measured lengths by their logarithm. In shorter samples what it takes more is taken to
    be linear in the tokens: turning, merging and launches.
    """
    lengths = sorted(DUAL_CHUNK)
    if tokens <= lengths[0]:
        return 1 + (DUAL_CHUNK[lengths[0]] - 1) * lengths[0] / tokens
    for left, right in pairwise(lengths):
        if tokens <= right:
            part = math.log(tokens / left) / math.log(right / left)
            return DUAL_CHUNK[left] * (1 - part) + DUAL_CHUNK[right] * part
    return DUAL_CHUNK[lengths[-1]]


def product_share() -> float:
    """Return the share of peak that matrix products reached in this project's own measurement.

    docs/training.md: 4 layers of Llama-2-7B and its head, micro-batch 4 of 4096 tokens, forward
    and backward on one H200 in 176.62 ms, CREAM positions through the fused RoPE. What attention
    and the other kernels take by the constants above is not theirs.
    """
    shape, gpu, tokens = MODELS["llama-2-7b"], GPUS["h200"], 4 * 4096
    peak = gpu.tflops * 1e12
    attention = 4 * (layer_flops(shape, 4096) - _product_flops(shape)) / (peak * ATTENTION_SHARE)
    others = (4 * layer_traffic(shape) + LOGIT_BYTES * shape.vocabulary) / gpu.memory_rate
    flops = tokens * (4 * _product_flops(shape) + _head_flops(shape))
    return flops / (176.62e-3 - tokens * (attention + others)) / peak


def step_time(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    gpu: Gpu,
    mfu: float,
    node: int = 8,
    tuning: Tuning = MEGATRON_DEFAULTS,
) -> StepTime:
    """Return the seconds per step on ``layout``.

    Args:
        mfu: share of ``gpu.tflops`` that bf16 matrix products reach.
        node: GPUs of a node.
    """
    batches = layout.micro_batches(work)
    stages = []
    for stage in layout.telling_stages:
        kernels = kernel_seconds(shape, layout, work, gpu, mfu, tuning, stage)
        busy = kernels + exposed_seconds(shape, layout, work, gpu, node, tuning, stage)
        launches = _layers_run(layout, layout.layers_of(stage, shape.layers)) * gpu.launch_ms / 1e3
        launches *= 1 + RING_LAUNCHES * (layout.context - 1)
        stages.append((max(busy, launches), busy, kernels))
    longest, busy, kernels = max(stages)
    replicas = replica_seconds(shape, layout, gpu, node, tuning)
    return StepTime(
        kernels=batches * kernels,
        bubble=(layout.pipeline - 1) / layout.virtual * longest,
        communication=batches * (busy - kernels) + max(OVERLAP * replicas, replicas - longest),
        update=_update(shape, layout, batches, gpu, tuning),
        launches=batches * (longest - busy),
    )


def _layers_run(layout: ParallelLayout, layers: int) -> float:
    """Return the layers of a stage; one that is run again counts a third more."""
    return layers * (1 + layout.recomputed(layers) / 3)


def kernel_seconds(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    gpu: Gpu,
    mfu: float,
    tuning: Tuning = MEGATRON_DEFAULTS,
    stage: int = 0,
) -> float:
    """Return the seconds of the kernels of a GPU of ``stage`` for one micro-batch."""
    tokens = work.seq_length * work.micro_batch / (layout.context * layout.tensor)
    rate = gpu.tflops * 1e12
    products = _product_flops(shape) / (rate * mfu * (FP8_SPEEDUP if tuning.fp8 else 1))
    attention = 6.0 * work.attended * shape.heads * shape.head_dim / (rate * ATTENTION_SHARE)
    attention *= dual_chunk_factor(work.attended) if tuning.dual_chunk else 1.0
    layer = products + attention + layer_traffic(shape, tuning.fp8) / gpu.memory_rate
    seconds = _layers_run(layout, layout.layers_of(stage, shape.layers)) * layer
    if stage == layout.pipeline - 1:  # the output layer stays in bf16
        seconds += _head_flops(shape) / (rate * mfu)
        seconds += LOGIT_BYTES * shape.vocabulary / gpu.memory_rate
    return seconds * tokens


def exposed_seconds(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    gpu: Gpu,
    node: int = 8,
    tuning: Tuning = MEGATRON_DEFAULTS,
    stage: int = 0,
) -> float:
    """Return the seconds in which a GPU of ``stage`` sends activations of a micro-batch unhidden.

    Ring algorithms: n ranks that gather or scatter B bytes send
    (n - 1) / n of B each. Ranks are numbered tensor parallel first, then context, data and
    pipeline, as Megatron does.
    """
    tokens = work.seq_length * work.micro_batch / layout.context
    hidden = 2.0 * tokens * shape.hidden
    layers = layout.layers_of(stage, shape.layers)
    passes = _exposed_passes(layout, work, tuning, layout.recomputed(layers))
    tensor = passes * hidden * (layout.tensor - 1) / layout.tensor
    tensor /= _speed(gpu, layout.tensor, node)
    # Keys and values go round the ring, again in the backward pass, and their gradients with
    # them, beside the attention to those that are there already.
    values = 4.0 * tokens * shape.groups * shape.head_dim / layout.tensor
    ring = 3 * values * (layout.context - 1) / _speed(gpu, layout.tensor * layout.context, node)
    attention = 6.0 * work.attended * shape.heads * shape.head_dim * tokens / layout.tensor
    attention /= gpu.tflops * 1e12 * ATTENTION_SHARE
    attention *= not tuning.dual_chunk  # it gathers all of them before it begins
    # A token goes to its experts and back, and so do the gradients; nothing runs beside it.
    experts = (4 + 2 * layout.recomputed(layers)) * (shape.experts_per_token or 0) * hidden
    experts *= (layout.expert - 1) / layout.expert / layout.tensor
    experts /= _speed(gpu, layout.expert, node)
    stages = 2 * hidden / layout.tensor / _speed(gpu, layout.gpus, node)
    stages *= OVERLAP * layout.virtual if layout.virtual > 1 else min(1, layout.pipeline - 1)
    return layers * (tensor + experts + max(0.0, ring - attention)) + stages


def _exposed_passes(layout: ParallelLayout, work: Workload, tuning: Tuning, again: float) -> float:
    """Gathers and scatters of a micro-batch's activations in a layer that no kernel hides.

    There are 4 forward, 4 backward, and 2 gathers more for the weights' gradients; the share
    ``again`` of the layers has the forward ones once more. Megatron runs 4 of those backward beside
    a product. With --tp-comm-overlap all go in as many pieces as there are ranks, each but one
    beside a product; products of pieces of fewer than ``PIECE_TOKENS`` run slower, which gains
    nothing.
    """
    passes = 10 + 4 * again
    if not tuning.tp_overlap:
        return passes - 4
    tokens = work.seq_length * work.micro_batch / layout.context
    return passes / max(1, min(layout.tensor, tokens / PIECE_TOKENS))


def replica_seconds(
    shape: ModelShape,
    layout: ParallelLayout,
    gpu: Gpu,
    node: int = 8,
    tuning: Tuning = MEGATRON_DEFAULTS,
) -> float:
    """Return the seconds in which a GPU scatters gradients and gathers bf16 weights."""
    stage = largest_stage(shape, layout)
    groups = [
        (dense_parameters(shape, layout, stage), layout.tensor, layout.context * layout.data),
        (expert_parameters(shape, layout, stage), layout.expert, layout.expert_copies),
    ]
    return sum(
        (tuning.gradient_bytes + WEIGHT)
        * parameters
        * ((copies - 1) / copies)
        / ring_speed(gpu, stride, stride * copies, node)
        for parameters, stride, copies in groups
    )


def _speed(gpu: Gpu, ranks: int, node: int) -> float:
    """Bytes per second between neighbours of a group that spans ``ranks`` consecutive ranks."""
    return gpu.node_rate if ranks <= node else gpu.network_rate


def ring_speed(gpu: Gpu, stride: int, ranks: int, node: int) -> float:
    """Return the bytes per second of a collective's rings over every ``stride``-th rank of a group.

    Args:
        ranks: from the group's first rank to its last one, those between counted.

    A group with k members in a node leaves it through their k network cards, one ring each. The
    links of the node bound it, and every ring passes through them.
    """
    if ranks <= node:
        return gpu.node_rate
    members = max(1, node // stride)
    return min(gpu.node_rate, members * gpu.network_rate)


def _update(
    shape: ModelShape, layout: ParallelLayout, batches: int, gpu: Gpu, tuning: Tuning
) -> float:
    """Seconds in which weights and gradients go through the GPU's memory.

    Bytes per parameter: each micro-batch's gradient is read (2) and added up (in fp32 8), unless
    its product does that; once a step their norm is taken (4), and of this rank's share gradient,
    copy and moments are read (16) and copy, moments and weight written (14).
    """
    stage = largest_stage(shape, layout)
    dense = dense_parameters(shape, layout, stage)
    experts = expert_parameters(shape, layout, stage)
    own = dense / (layout.data * layout.context) + experts / layout.expert_copies
    gradient = tuning.gradient_bytes
    each = 0 if tuning.fused_gradients else WEIGHT + 2 * gradient
    moved = (dense + experts) * (each * batches + gradient)
    moved += own * (gradient + 2 * tuning.optimizer_bytes + WEIGHT)
    return moved / gpu.memory_rate
