# SPDX-License-Identifier: Apache-2.0
"""Estimates memory per GPU by closed forms: weights, gradients, optimizer, activations, in bytes.

For bf16 training with the distributed optimizer, Transformer Engine's fused layers, flash attention
and no dropout. Megatron has an estimator of its own (``megatron.training
.theoretical_memory_usage``). Its 6 + 12 / DP bytes per parameter are the same as here; its
parameters leave out biases and uneven stages, and its optimizer is not divided by the context
parallel size, over which Megatron does shard it. Its activations are those of arXiv:2205.05198,
table 2, whose MLP is not gated: a SwiGLU layer keeps 6 f bytes per token and not 4 f. So
activations are counted here tensor by tensor; docs/planning.md has them next to a GPU's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload

GIB = 2**30

VOCAB_MULTIPLE = 128
"""Megatron's --make-vocab-size-divisible-by; it pads to that times the tensor parallel size."""

WEIGHT = 2
"""Bytes per parameter: bf16. Gradients and optimizer are as ``Tuning`` says."""

SAVED = 14
"""Bytes per parameter of a checkpoint: bf16 weight, fp32 copy and two moments."""

FP8_COPIES = 2
"""Bytes per parameter of a layer's products beside bf16: a weight and its transpose in FP8."""

RESERVE_GIB = 5.0
"""Left free: CUDA context, NCCL's buffers, workspaces and the allocator's fragmentation.

Measured on one H200 as what PyTorch reserves above what it has allocated at the peak: 1.6 to 4.1.
"""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        weights, gradients, optimizer: what stays.
        activations: what layers keep between forward and backward, all micro-batches in flight.
        working: the peak above these: the logits and their softmax, or one layer's backward.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """Return the rows of the embedding that Megatron makes for a tensor parallel size."""
    multiple = VOCAB_MULTIPLE * tensor
    return math.ceil(shape.vocabulary / multiple) * multiple


def layer_matrices(shape: ModelShape) -> int:
    """Return the parameters of one layer that tensor parallelism divides, biases of q, k, v too."""
    qkv = (shape.heads + 2 * shape.groups) * shape.head_dim
    attention = qkv * shape.hidden + shape.heads * shape.head_dim * shape.hidden
    return attention + 3 * shape.hidden * shape.ffn + (qkv if shape.qkv_bias else 0)


def layer_norms(shape: ModelShape) -> int:
    """Return the parameters of one layer that every tensor-parallel rank has whole."""
    return 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)


def stage_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the parameters on each GPU of a pipeline stage; padding of the vocabulary counts."""
    layers = layout.layers_of(stage, shape.layers)
    matrices = layers * layer_matrices(shape)
    norms = layers * layer_norms(shape)
    table = padded_vocab(shape, layout.tensor) * shape.hidden
    last = stage == layout.pipeline - 1
    matrices += table if stage == 0 else 0
    # A tied output layer on another stage than the embedding is a copy of it.
    matrices += table if last and (not shape.tied or layout.pipeline > 1) else 0
    return matrices // layout.tensor + norms + (shape.hidden if last else 0)


def largest_stage(shape: ModelShape, layout: ParallelLayout) -> int:
    """Return the parameters on each GPU of the stage that has most."""
    return max(stage_parameters(shape, layout, stage) for stage in layout.telling_stages)


def layer_activations(shape: ModelShape, tensor: int = 1, fp8: bool = False) -> float:
    """Return the bytes per token that one layer keeps for its backward pass.

    Inputs and outputs of both norms 8 h; queries and the output of attention 4 a d; keys and
    values 4 g d; log-sum-exp of attention 4 a; gate and up projection and their product 6 f.
    Tensor parallelism divides all of it, because sequence parallelism goes with it. In FP8 the
    inputs of the four products have 1 byte: outputs of the norms and that of the MLP's gate need
    no other copy, the output of attention is kept in bf16 as well.
    """
    attention = shape.head_dim * (4 * shape.heads + 4 * shape.groups) + 4 * shape.heads
    kept = 8 * shape.hidden + attention + 6 * shape.ffn
    if fp8:
        kept += shape.head_dim * shape.heads - 2 * shape.hidden - shape.ffn
    return kept / tensor


def output_activations(shape: ModelShape, tensor: int = 1) -> float:
    """Return the bytes per token of the last norm and of logits in bf16 and softmax in fp32."""
    logits = 6 * padded_vocab(shape, tensor) / tensor
    return 4 * shape.hidden / tensor + logits


def stage_memory(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    stage: int,
    parameters: int | None = None,
    tuning: Tuning = MEGATRON_DEFAULTS,
) -> StageMemory:
    """Return what a GPU of pipeline stage ``stage`` (from 0) needs under Megatron's schedules.

    Args:
        parameters: on that GPU, where they are known better than ``stage_parameters``.
    """
    if parameters is None:
        parameters = stage_parameters(shape, layout, stage)
    layers = layout.layers_of(stage, shape.layers)
    tokens = work.seq_length * work.micro_batch // layout.context
    in_flight = layout.in_flight(work, stage)
    whole = layer_activations(shape, layout.tensor, tuning.fp8)
    again = layout.recomputed(layers)
    kept = again * 2 * shape.hidden / layout.tensor + (1 - again) * whole
    # Backward of a layer: gradients of what it kept, which recomputation makes first.
    working = 2 * whole if again else whole
    if stage == layout.pipeline - 1:
        working = max(working, output_activations(shape, layout.tensor))
    copies = FP8_COPIES * layers * layer_matrices(shape) / layout.tensor if tuning.fp8 else 0
    return StageMemory(
        weights=WEIGHT * parameters + copies,
        gradients=parameters * tuning.gradient_bytes,
        optimizer=parameters * tuning.optimizer_bytes / (layout.data * layout.context),
        activations=tokens * in_flight * layers * kept,
        working=tokens * working,
    )


def peak_memory(
    shape: ModelShape, layout: ParallelLayout, work: Workload, tuning: Tuning = MEGATRON_DEFAULTS
) -> StageMemory:
    """Return the memory of the stage that needs most."""
    stages = (
        stage_memory(shape, layout, work, stage, tuning=tuning) for stage in layout.telling_stages
    )
    return max(stages, key=lambda memory: memory.total)
