# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint as a model to score with, spread over tensor, pipeline, context ranks.

Every rank is given the same passes. Hidden states travel from stage to stage, the last stage makes
logits where a prediction is asked for and nowhere else, keeps each shard of the vocabulary where it
is, and answers to all ranks with one number and one token a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_cream.checkpoint.iterations import find_checkpoint
from megatron_cream.checkpoint.loading import load_model
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.evaluation.attention import attend, tails
from megatron_cream.evaluation.context_parallel import Slice
from megatron_cream.evaluation.forward import Pass, Scores
from megatron_cream.evaluation.vocabulary import score_rows
from megatron_cream.mcore.cpu import is_installed
from megatron_cream.parallel_layout import ONE_PROCESS, ParallelLayout
from megatron_cream.rope.huggingface import claimed_window


class MegatronModel:
    """This rank's part of a checkpoint; see ``passes.Model``.

    Args:
        path: folder given to --save, or one iteration in it.
        extension: settings to evaluate with instead of the saved ones.
        layout: sizes of the parallel groups; torchrun starts the processes.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``, and context parallelism without GPUs.
    """

    def __init__(
        self,
        path: str,
        extension: ExtensionConfig | None = None,
        layout: ParallelLayout = ONE_PROCESS,
    ) -> None:
        cpu = is_installed()
        if layout.context > 1 and cpu:
            raise UserError(
                f"--context-parallel-size is {layout.context} with --cpu: it must be 1, ring "
                "attention needs Transformer Engine and GPUs"
            )
        loaded = load_model(path, extension, layout)
        self.name, self.layout, self.args = path, layout, loaded.args
        # The wrapper of a 16-bit model would make all its logits float32.
        self.module, self.extension = unwrap_model(loaded.module), loaded.extension
        self.window = claimed_window(
            self.extension.rope_interpolation,
            self.extension.original_length,
            self.extension.target_length,
        )
        self.vocabulary = loaded.args.vocab_size or loaded.args.padded_vocab_size
        self.primary = torch.distributed.get_rank() == 0
        self.shares_context = layout.context == 1 and _give_attention(self.module)
        self.settings = {
            "iteration": find_checkpoint(path).name,
            "extension": loaded.extension.to_dict(),
        }

    def set_length(self, length: int) -> None:
        """Turn as for sequences of ``length`` tokens."""
        self.module.rotary_pos_emb.set_length(length)

    @torch.inference_mode()
    def run(self, passes: Iterator[Pass]) -> Iterator[Scores]:
        """Answer passes in order; with pipeline stages, a few at a time so that all have work."""
        several = 1 if self.layout.pipeline == 1 else 2 * self.layout.pipeline
        passes = iter(passes)
        while some := list(islice(passes, several)):
            sends: list[Any] = []
            answers = [self._stage(one, sends) for one in some]
            for send in sends:
                send.wait()
            for one, answer in zip(some, answers, strict=True):
                yield self._to_all(one, answer)

    def _stage(self, one: Pass, sends: list[Any]) -> tuple[Tensor, Tensor] | None:
        """Run this stage; the last one returns log-probabilities and arg-max ``[b, r]``."""
        own = Slice(one, mpu.get_context_parallel_rank(), self.layout.context)
        if not mpu.is_pipeline_first_stage():
            self.module.set_input_tensor(self._receive(own.tokens.shape))
        hidden = _hidden(self.module, own, one.tails, one.tail)
        if not mpu.is_pipeline_last_stage():
            next_rank = mpu.get_pipeline_model_parallel_next_rank()
            sends.append(torch.distributed.isend(hidden.contiguous(), next_rank))
            return None
        hidden, weight = hidden
        kept = hidden[own.kept.to(hidden.device)].transpose(0, 1)  # [b, rows here, h]
        found = self._score(kept, weight, own.targets.to(kept.device))
        return own.gather(*found, group=mpu.get_context_parallel_group())

    def _score(self, kept: Tensor, weight: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = getattr(self.module, "_scale_logits", lambda logits: logits)
        if not targets.numel():
            return torch.zeros_like(targets, dtype=torch.float64), targets
        logprobs, best = score_rows(
            kept.flatten(0, 1),
            lambda rows: scale(self.module.output_layer(rows, weight=weight)[0]),
            targets.flatten(),
            self.vocabulary,
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_tensor_model_parallel_group() if self.layout.tensor > 1 else None,
        )
        return logprobs.view(targets.shape), best.view(targets.shape)

    def _receive(self, shape: torch.Size) -> Tensor:
        batch, tokens = shape
        weight = next(self.module.parameters())
        hidden = weight.new_empty((tokens, batch, self.module.config.hidden_size))
        torch.distributed.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _to_all(self, one: Pass, answer: tuple[Tensor, Tensor] | None) -> Scores:
        device = next(self.module.parameters()).device
        if answer is None:
            shape = one.targets.shape
            answer = (
                torch.empty(shape, dtype=torch.float64, device=device),
                torch.empty(shape, dtype=torch.int64, device=device),
            )
        if self.layout.pipeline > 1:
            last = mpu.get_pipeline_model_parallel_last_rank()
            for values in answer:
                torch.distributed.broadcast(values, last, mpu.get_pipeline_model_parallel_group())
        return Scores(*(values.cpu() for values in answer))


def _hidden(module: Any, own: Slice, count: int, tokens: int) -> Any:
    """Return what the stage hands on ``[n, b, h]``; of the last one also its output weight."""
    device = next(module.parameters()).device
    seen: list[tuple[Tensor, Tensor | None]] = []

    def keep_one(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen.append((args[0], kwargs.get("weight")))
        return (args[0][-1:], *args[1:]), kwargs

    last = mpu.is_pipeline_last_stage()
    handle = (
        module.output_layer.register_forward_pre_hook(keep_one, with_kwargs=True) if last else None
    )
    try:
        with tails(count, tokens):
            output = module(
                input_ids=own.tokens.to(device),
                position_ids=own.positions.to(device),
                attention_mask=None,
            )
    finally:
        if handle is not None:
            handle.remove()
    return seen[0] if last else output


def _give_attention(module: Any) -> bool:
    """Replace the core attention of every layer by ours; say whether that was possible.

    Attribute: ``Attention.core_attention``. Megatron's local one makes an O(s^2) matrix and
    Transformer Engine's knows no tails. Layers with a window, sinks or scaling of their own keep
    theirs.
    """
    from megatron.core.transformer.attention import Attention

    config = module.config
    if config.window_size is not None or config.softmax_type != "vanilla":
        return False
    if config.apply_query_key_layer_scaling:
        return False
    layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
    for layer in layers:
        layer.core_attention = CoreAttention(config)
    return True


class CoreAttention(torch.nn.Module):
    """Megatron's interface to ``attention.attend``: ``[n, b, h, d]`` in, ``[n, b, h * d]`` out."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        scale = config.softmax_scale
        self.scale = config.kv_channels**-0.5 if scale is None else scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
    ) -> Tensor:
        """Attend causally; tails as ``attention.tails`` says."""
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(*heads, self.scale).permute(2, 0, 1, 3).flatten(2)
