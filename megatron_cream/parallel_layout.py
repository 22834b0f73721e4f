# SPDX-License-Identifier: Apache-2.0
"""Describes how a model and a batch are spread over GPUs: one class to plan, check and load by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cream.errors import UserError


@dataclass(frozen=True)
class Workload:
    """What a training step takes in.

    Attributes:
        seq_length: tokens per sample.
        global_batch: samples per step, over all GPUs.
        micro_batch: samples of one forward pass.
        document: tokens of a document, where a sample is packed from several that do not attend
            to each other.
    """

    seq_length: int
    global_batch: int
    micro_batch: int = 1
    document: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.seq_length * self.global_batch

    @property
    def attended(self) -> int:
        """Tokens over which attention reaches: of a sample, or of a document in it."""
        return self.document or self.seq_length


@dataclass(frozen=True)
class Tuning:
    """Options of a run that change its speed or memory and not how it is spread over GPUs.

    Attributes:
        fp8: matrix products of the layers in FP8, one scale per tensor (--fp8-recipe tensorwise).
        tp_overlap: --tp-comm-overlap: products run beside what tensor parallelism sends.
        fused_gradients: products of weight gradients add them up themselves, Megatron's default;
            it needs Apex.
        gradient_bytes: per parameter, of the buffer that micro-batches are added up in: 4, or 2
            with --grad-reduce-in-bf16.
        optimizer_bytes: per parameter, master copy and the two moments of Adam, before they are
            divided over the data and context parallel ranks.
        dual_chunk: --dual-chunk: attention in chunks.
    """

    fp8: bool = False
    tp_overlap: bool = False
    fused_gradients: bool = True
    gradient_bytes: float = 4
    optimizer_bytes: float = 12
    dual_chunk: bool = False


MEGATRON_DEFAULTS = Tuning()


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel groups; their product is the number of ranks, one per GPU.

    A plan chooses all of them; an evaluation spreads one copy of the model over the first three.

    Attributes:
        tensor, pipeline, context, data: Megatron's four parallel sizes. Sequence parallelism goes
            with tensor parallelism.
        first_layers, last_layers: layers of the first and last stage, where they are not even.
        recompute: layers keep their input alone and are run again in the backward pass.
        recompute_layers: so many do, the first of each virtual stage; all of them where None.
        virtual: virtual stages per pipeline rank: its layers in as many pieces, interleaved.
        expert: ranks that the experts of a layer are spread over, each with whole ones; they are
            among those of the tensor, context and data parallel groups.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    recompute: bool = False
    virtual: int = 1
    recompute_layers: int | None = None
    expert: int = 1

    @property
    def gpus(self) -> int:
        """GPUs it takes: its ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        context = f" CP{self.context}" if self.context > 1 else ""
        expert = f" EP{self.expert}" if self.expert > 1 else ""
        virtual = f" VP{self.virtual}" if self.virtual > 1 else ""
        sizes = f"TP{self.tensor} PP{self.pipeline}{virtual}{context}{expert} DP{self.data}"
        blocks = "" if self.recompute_layers is None else f" {self.recompute_layers}"
        return sizes + (f", recompute{blocks}" if self.recompute else "")

    @property
    def expert_copies(self) -> int:
        """Ranks that have the same experts of a pipeline stage."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def telling_stages(self) -> list[int]:
        """Stages one of which needs most: those after the second need no more than it does."""
        return sorted({0, min(1, self.pipeline - 1), self.pipeline - 1})

    def layers_of(self, stage: int, layers: int) -> int:
        """Return how many of ``layers`` layers a stage has."""
        last, first = self.last_layers, self.first_layers if self.pipeline > 1 else None
        own = last if stage == self.pipeline - 1 else first if stage == 0 else None
        if own is not None:
            return own
        middle = self.pipeline - (first is not None) - (last is not None)
        return (layers - (first or 0) - (last or 0)) // max(1, middle)

    def stages(self, layers: int) -> list[Sequence[int]]:
        """Return the layers of each pipeline stage, counted from 0, as Megatron splits them.

        With virtual stages every rank has a piece of each round over the stages.

        Raises:
            UserError: they cannot be split so.
        """
        if self.virtual > 1:
            return self._interleaved(layers)
        ends = [n for n in (self.first_layers, self.last_layers) if n is not None]
        middle, left = self.pipeline - len(ends), layers - sum(ends)
        if left < 0 or (left % middle if middle else left):
            raise UserError(
                f"{layers} layers cannot be split over {self.pipeline} pipeline stages: "
                f"{left} layers for {middle} stages after the uneven ones"
            )
        counts = [left // middle if middle else 0] * self.pipeline
        counts[0] = counts[0] if self.first_layers is None else self.first_layers
        counts[-1] = counts[-1] if self.last_layers is None else self.last_layers
        bounds = [sum(counts[:i]) for i in range(self.pipeline + 1)]
        return [range(bounds[i], bounds[i + 1]) for i in range(self.pipeline)]

    def _interleaved(self, layers: int) -> list[Sequence[int]]:
        pieces = self.pipeline * self.virtual
        if layers % pieces or self.first_layers is not None or self.last_layers is not None:
            raise UserError(
                f"{layers} layers cannot be split evenly over {self.pipeline} pipeline stages of "
                f"{self.virtual} virtual stages"
            )
        size = layers // pieces
        return [
            [
                first + n
                for first in range(stage * size, layers, size * self.pipeline)
                for n in range(size)
            ]
            for stage in range(self.pipeline)
        ]

    def recomputed(self, layers: int) -> float:
        """Return the share of a stage's ``layers`` that are run again in the backward pass."""
        if not self.recompute or self.recompute_layers is None:
            return float(self.recompute)
        return min(1.0, self.recompute_layers * self.virtual / layers)

    def micro_batches(self, work: Workload) -> int:
        """Return how many micro-batches go through the pipeline in a step."""
        return work.global_batch // (work.micro_batch * self.data)

    def in_flight(self, work: Workload, stage: int) -> float:
        """Return how many micro-batches a stage (from 0) keeps activations of at the most.

        One virtual stage: as many as there are stages from this one on. With interleaving a rank
        of p runs 2 (p - 1 - stage) + (v - 1) p pieces forward before its first backward, and one
        more beside each (Megatron's schedules.py); a piece is 1 / v of a micro-batch.
        """
        ahead = self.pipeline - stage
        if self.virtual == 1:
            return min(self.micro_batches(work), ahead)
        pieces = 2 * (ahead - 1) + (self.virtual - 1) * self.pipeline + 1
        return min(self.micro_batches(work), pieces / self.virtual)


ONE_PROCESS = ParallelLayout()
