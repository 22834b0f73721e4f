# SPDX-License-Identifier: Apache-2.0
"""Describes how a model and a batch are spread over GPUs: one class to plan, check and load by."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.errors import UserError


@dataclass(frozen=True)
class Workload:
    """What a training step takes in.

    Attributes:
        seq_length: tokens per sample.
        global_batch: samples per step, over all GPUs.
        micro_batch: samples of one forward pass.
    """

    seq_length: int
    global_batch: int
    micro_batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.seq_length * self.global_batch


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel groups; their product is the number of ranks, one per GPU.

    A plan chooses all of them; an evaluation spreads one copy of the model over the first three.

    Attributes:
        tensor, pipeline, context, data: Megatron's four parallel sizes. Sequence parallelism goes
            with tensor parallelism.
        first_layers, last_layers: layers of the first and last stage, where they are not even.
        recompute: layers keep their input alone and are run again in the backward pass.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    recompute: bool = False

    @property
    def gpus(self) -> int:
        """GPUs it takes: its ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        context = f" CP{self.context}" if self.context > 1 else ""
        sizes = f"TP{self.tensor} PP{self.pipeline}{context} DP{self.data}"
        return sizes + (", recompute" if self.recompute else "")

    def stages(self, layers: int) -> list[range]:
        """Return the layers of each pipeline stage, counted from 0, as Megatron splits them.

        Raises:
            UserError: they cannot be split so.
        """
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

    def micro_batches(self, work: Workload) -> int:
        """Return how many micro-batches go through the pipeline in a step."""
        return work.global_batch // (work.micro_batch * self.data)


ONE_PROCESS = ParallelLayout()
