# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint as a model to score with, spread over tensor, pipeline, context ranks.

Every rank is given the same passes. Hidden states travel from stage to stage, the last stage makes
logits where a prediction is asked for and nowhere else, keeps each shard of the vocabulary where it
is, and answers to all ranks with one number and one token per prediction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import batched
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.attention.bands import Bands
from megatron_cream.checkpoint.hf_folder import find_kept_files, read_config
from megatron_cream.checkpoint.iterations import find_checkpoint
from megatron_cream.checkpoint.loading import load_model
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.evaluation import generation
from megatron_cream.evaluation.forward import (
    ForwardPass,
    PassScores,
    ScoringModel,
    attend,
    keep,
    score_rows,
    tails,
)
from megatron_cream.evaluation.long_attention import BeyondWindow
from megatron_cream.mcore.build_model import PipelineStage, leave_unrotated
from megatron_cream.mcore.cpu import is_installed
from megatron_cream.parallel_layout import ONE_PROCESS, ParallelLayout
from megatron_cream.rope.huggingface import claimed_window


class MegatronModel(ScoringModel):
    """This rank's part of a checkpoint; see ``forward.ScoringModel``.

    Args:
        path: folder given to --save, or one iteration in it.
        extension: settings to evaluate with instead of the saved ones.
        layout: sizes of the parallel groups; torchrun starts the processes.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``, and context parallelism without GPUs.
    """

    stop_tokens: tuple[int, ...] = ()  # the tokenizer says which

    def __init__(
        self,
        path: str,
        extension: ExtensionConfig | None = None,
        layout: ParallelLayout = ONE_PROCESS,
    ) -> None:
        if layout.context > 1 and is_installed():
            raise UserError(
                f"--context-parallel-size is {layout.context} with --cpu: it must be 1, ring "
                "attention needs Transformer Engine and GPUs"
            )
        loaded = load_model(path, extension, layout)
        self.name, self.layout, self.extension = path, layout, loaded.extension
        self.trained_attention = loaded.attention
        self._args = loaded.args
        self.stage = PipelineStage(loaded.module)
        self.window = claimed_window(
            self.extension.rope_interpolation,
            self.extension.original_length,
            self.extension.target_length,
        )
        self.vocabulary = loaded.args.vocab_size
        self.primary = torch.distributed.get_rank() == 0
        # Megatron's own attention makes an O(s^2) matrix, Transformer Engine's knows no tails.
        self.shares_context = layout.context == 1 and self.stage.replace_core_attention(
            CoreAttention
        )
        folder = find_checkpoint(path)
        self.settings = {
            "iteration": folder and folder.name,
            "extension": self.extension.to_dict(),
        }

    @property
    def dual_chunk(self) -> dict[str, Any] | None:
        """Sizes that it was trained with, else those of the model that its training began with."""
        if self.trained_attention:
            return dict(self.trained_attention.given)
        try:
            kept = find_kept_files(self.name, self._args)
        except FileNotFoundError as error:
            if self.primary:
                print(f"note: {error}; sizes that are not given follow from the window",
                      file=sys.stderr)  # fmt: skip
            return None
        return read_config(kept).get("dual_chunk_attention_config") if kept else None

    def attend_beyond_window(self, bands: Bands, flag: str) -> None:
        """Attend over ``bands`` from now on.

        Raises:
            UserError: naming the flag; the model has another attention or RoPE.
        """
        stage, rotary = self.stage, self.stage.module.rotary_pos_emb
        scaling = rotary.scaling
        beyond = BeyondWindow(
            bands,
            scaling,
            rotary.rotary_interleaved,
            rotary.attention_factor_in_softmax,
            stage.context_group if self.layout.context > 1 else None,
        )
        if (
            scaling.varies_with_length
            or self.extension.trained
            or not stage.replace_core_attention(partial(CoreAttention, attend=beyond.attend))
        ):
            raise UserError(
                f"{flag} with --checkpoint {self.name}: its attention must have no window or "
                f"scaling of its own, and its RoPE must be fixed; it is {scaling.summary}"
            )
        leave_unrotated(stage.module)

    def set_length(self, length: int) -> None:
        """Set angles for sequences of ``length`` tokens."""
        self.stage.module.rotary_pos_emb.set_length(length)

    @torch.inference_mode()
    def run(self, passes: Iterator[ForwardPass]) -> Iterator[PassScores]:
        """Answer passes in order; with pipeline stages, a few at a time so that all have work."""
        several = 1 if self.layout.pipeline == 1 else 2 * self.layout.pipeline
        for some in batched(passes, several):
            sends: list[Any] = []
            answers = [self._run_stage(one, sends) for one in some]
            for send in sends:
                send.wait()
            for one, answer in zip(some, answers, strict=True):
                yield self._broadcast(one, answer)

    def generate(
        self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int], stop: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yield what greedy decoding writes after each prompt ``[n]``, in order.

        Prompts go several at a time, as many as every rank has memory for. Where the model keeps
        an attention of Megatron's, every token costs a pass over the whole text.
        """
        if not self.shares_context:
            yield from super().generate(prompts, new_tokens, stop)
            return
        size = self._batch_size([len(prompt) for prompt in prompts], max(new_tokens, default=0))
        for batch, own in zip(batched(prompts, size), batched(new_tokens, size), strict=True):
            yield from generation.collect(self._decode(batch, max(own)), own, stop)

    def write(self, prompt: np.ndarray, most: int) -> Iterator[int]:
        """Yield up to ``most`` tokens that greedy decoding writes after a prompt ``[n]``."""
        if not self.shares_context:
            yield from super().write(prompt, most)
            return
        for best in self._decode([prompt], most):
            yield int(best)

    def _decode(self, prompts: Sequence[np.ndarray], most: int) -> Iterator[Tensor]:
        stage = self.stage
        return generation.decode(self._next, prompts, most, stage.device, stage.broadcast_from_last)

    def _next(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the most likely token ``[b]`` after the last of ``tokens`` on the last stage."""
        stage = self.stage
        if not stage.is_first:
            stage.receive_input(*tokens.shape)
        seen: list[tuple[Tensor, Tensor | None]] = []
        with output_input(stage.module, seen):
            hidden = stage.module(input_ids=tokens, position_ids=positions, attention_mask=None)
        best = tokens.new_zeros(len(tokens), 1)
        if stage.is_last:
            ((hidden, weight),) = seen
            _, best = score_kept(stage, hidden[-1:].transpose(0, 1), weight, best, self.vocabulary)
        else:
            stage.send(hidden).wait()
        return best[:, 0]

    def _batch_size(self, lengths: Sequence[int], new_tokens: int) -> int:
        """Return how many prompts are answered together, the same number on every rank."""
        layers, config = self.stage.attention_layers, self.stage.module.config
        heads = max(1, config.num_query_groups // self.layout.tensor)
        there = generation.kept_tokens(
            *(layers, heads, config.kv_channels, config.params_dtype),
            self.stage.device.type == "cuda",
        )
        fewest = torch.tensor(there, device=self.stage.device)
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
        return generation.batch_size(lengths, new_tokens, int(fewest))

    def _run_stage(self, one: ForwardPass, sends: list[Any]) -> tuple[Tensor, Tensor] | None:
        """Run this stage; the last one returns log-probabilities and arg-max ``[b, r]``."""
        stage = self.stage
        own = ContextShard(one, stage.context_rank, self.layout.context)
        if not stage.is_first:
            stage.receive_input(*own.tokens.shape)
        if not stage.is_last:
            sends.append(stage.send(self._hidden(own, one)))
            return None
        seen: list[tuple[Tensor, Tensor | None]] = []
        with output_input(stage.module, seen):
            self._hidden(own, one)
        ((hidden, weight),) = seen
        kept = hidden[own.kept.to(hidden.device)].transpose(0, 1)  # [b, rows here, h]
        found = score_kept(stage, kept, weight, own.targets.to(kept.device), self.vocabulary)
        return own.gather(*found, group=stage.context_group)

    def _hidden(self, own: ContextShard, one: ForwardPass) -> Tensor:
        """Return hidden states ``[n, b, h]``; of the last stage, whatever the module returns."""
        device = self.stage.device
        with tails(one.tails, one.tail):
            return self.stage.module(
                input_ids=own.tokens.to(device),
                position_ids=own.positions.to(device),
                attention_mask=None,
            )

    def _broadcast(self, one: ForwardPass, answer: tuple[Tensor, Tensor] | None) -> PassScores:
        if answer is None:
            shape, device = one.targets.shape, self.stage.device
            answer = (
                torch.empty(shape, dtype=torch.float64, device=device),
                torch.empty(shape, dtype=torch.int64, device=device),
            )
        for values in answer:
            self.stage.broadcast_from_last(values)
        return PassScores(*(values.cpu() for values in answer))


def score_kept(
    stage: PipelineStage, kept: Tensor, weight: Tensor | None, targets: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and arg-max ``[b, q]`` on every tensor rank of the last stage.

    Args:
        kept: hidden states ``[b, q, h]`` of all tensor ranks.
        weight: of the output layer, where it has none of its own.
        targets: int64 ``[b, q]``.
        vocabulary: tokens that count, without padding rows of the output layer.
    """
    if not targets.numel():
        return torch.zeros_like(targets, dtype=torch.float64), targets
    module = stage.module
    scale = getattr(module, "_scale_logits", lambda logits: logits)
    logprobs, best = score_rows(
        kept.flatten(0, 1),
        lambda rows: scale(module.output_layer(rows, weight=weight)[0]),
        targets.flatten(),
        vocabulary,
        stage.tensor_rank,
        stage.tensor_group,
    )
    return logprobs.view(targets.shape), best.view(targets.shape)


@contextmanager
def output_input(module: Any, seen: list[tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Put what the output layer is given, and its weight, into ``seen``; it computes one row.

    On a stage without an output layer nothing happens.
    """

    def keep_all_make_one(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        seen.append((args[0], kwargs.get("weight")))
        return (args[0][-1:], *args[1:]), kwargs

    if not module.post_process:
        yield
        return
    handle = module.output_layer.register_forward_pre_hook(keep_all_make_one, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class ContextShard:
    """What one of ``ranks`` context-parallel ranks has of a pass.

    As Transformer Engine's ring attention wants it, the sequence is cut into ``2 * ranks`` chunks,
    of which rank i has i and ``2 * ranks - 1 - i``: causal attention costs all ranks the same.

    Attributes:
        tokens: ``[b, n / ranks]``; n is made a multiple of ``2 * ranks`` with tokens at the end,
            which no other token sees.
        positions: position ids ``[b, n / ranks]``.
        kept: ``[q]``, where in ``tokens`` the predictions are that this rank has.
        targets: ``[b, q]``, theirs.
        which: ``[q]``, which of the pass's predictions they are.
    """

    def __init__(self, one: ForwardPass, rank: int, ranks: int) -> None:
        self.ranks, self.shape = ranks, one.targets.shape
        self.tokens, self.positions = one.tokens, one.positions()
        self.kept, self.targets = one.rows, one.targets
        self.which = torch.arange(len(one.rows))
        if ranks > 1:
            self._cut(one, rank)

    def _cut(self, one: ForwardPass, rank: int) -> None:
        batch, length = one.tokens.shape
        step = 2 * self.ranks
        whole = -(-length // step) * step
        padding = torch.zeros(batch, whole - length, dtype=torch.int64)
        tokens = torch.cat([one.tokens, padding], dim=1)
        chunks = torch.arange(whole).chunk(step)
        places = torch.cat([chunks[rank], chunks[step - 1 - rank]])
        local = torch.full((whole,), -1)
        local[places] = torch.arange(len(places))
        self.tokens, self.positions = tokens[:, places], places.expand(batch, -1)
        here = local[one.rows] >= 0
        self.which = here.nonzero()[:, 0]
        self.kept, self.targets = local[one.rows][here], one.targets[:, here]

    def gather(self, logprobs: Tensor, best: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """Return the answers ``[b, r]`` to all rows out of every rank's ``[b, q]``."""
        if self.ranks == 1:
            return logprobs, best
        result = []
        for values in (logprobs, best):
            whole = values.new_zeros(self.shape)
            whole[:, self.which.to(values.device)] = values
            torch.distributed.all_reduce(whole, group=group)
            result.append(whole)
        return result[0], result[1]


class CoreAttention(torch.nn.Module):
    """Megatron's interface to ``forward.attend``: ``[n, b, h, d]`` in, ``[n, b, h * d]`` out."""

    def __init__(self, config: Any, attend: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        self.attend = attend
        scale = config.softmax_scale
        self.scale = config.kv_channels**-0.5 if scale is None else scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
    ) -> Tensor:
        """Attend causally; tails as ``forward.tails`` says."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = keep(self, key, value)
        return self.attend(query, key, value, self.scale).permute(2, 0, 1, 3).flatten(2)
