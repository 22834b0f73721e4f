# SPDX-License-Identifier: Apache-2.0
"""Decodes greedily with a model of transformers, several prompts at once with keys and values kept.

Prompts are computed one after the other, each without padding, as if it stood alone. Their keys and
values lie in one buffer per layer in which all prompts end together; then every step writes one
token of each. Where a shorter prompt has nothing yet, nothing is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from megatron_cream.evaluation.forward import KEYS_MULTIPLE, KeysSeen, seeing


class BatchCache(Cache):
    """Keys and values of b sequences, ``[b, g, size, d]`` per layer.

    Args:
        lengths: tokens of each prompt.
        new_tokens: most tokens that are written after any.

    Attributes:
        row: which prompt is being computed; None while tokens are written after all of them.
        size: columns, of which the last are never used.
        seen: which of them each sequence sees.
    """

    def __init__(self, lengths: Sequence[int], new_tokens: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.lengths, self.longest = lengths, max(lengths)
        self.size = -(-(self.longest + new_tokens) // KEYS_MULTIPLE) * KEYS_MULTIPLE
        self.row: int | None = None
        self.seen = KeysSeen(lengths, self.size, device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what is new; return keys and values ``[b, g, n, d]`` to attend to."""
        new = (key_states, value_states)
        if layer_idx not in self._kept:
            # Zeros, since what is not seen is still multiplied, by 0.
            keys, values = (
                x.new_zeros(len(self.lengths), x.shape[1], self.size, x.shape[3]) for x in new
            )
            self._kept[layer_idx] = keys, values
        kept = self._kept[layer_idx]
        if self.row is not None:
            place = slice(self.longest - self.lengths[self.row], self.longest)
            for buffer, values in zip(kept, new, strict=True):
                buffer[self.row, :, place] = values[0]
            return new
        for buffer, values in zip(kept, new, strict=True):
            buffer[:, :, self.seen.tokens - 1] = values[:, :, 0]
        return kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens came before."""
        return 0 if self.row is not None else self.seen.tokens - 1


@torch.inference_mode()
def generate_batch(
    module: Any,
    prompts: Sequence[np.ndarray],
    new_tokens: Sequence[int],
    stop: Sequence[int],
    vocabulary: int,
) -> list[np.ndarray]:
    """Return what greedy decoding writes after each prompt, without the token that stops it.

    Args:
        module: a model whose attention is ``forward``'s.
        prompts: int64 ``[n]`` each.
        new_tokens: most tokens to write after each.
        stop: tokens that end an answer.
        vocabulary: tokens that count; logits after them are left out.
    """
    device = module.device
    cache = BatchCache([len(prompt) for prompt in prompts], max(new_tokens), device)
    ends = torch.tensor(list(stop), device=device)
    head = module.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
    try:
        with sdpa_kernel(_ANY_LENGTH):
            best = _read_prompts(module, cache, prompts, vocabulary)
            written = [best]
            done = torch.isin(best, ends)
            limits = torch.tensor(new_tokens, device=device)
            positions = torch.tensor(cache.lengths, device=device)[:, None]
            cache.row = None
            with seeing(cache.seen):
                while not (done | (limits <= len(written))).all():
                    cache.seen.see_next()
                    best = _step(module, cache, best[:, None], positions, vocabulary)
                    written.append(best)
                    done |= torch.isin(best, ends)
                    positions = positions + 1
    finally:
        handle.remove()
    rows = torch.stack(written, dim=1).cpu().numpy()
    return [before_stop(row[:most], stop) for row, most in zip(rows, new_tokens, strict=True)]


# cuDNN's attention plans anew for every length that it has not seen: no two prompts have the same.
_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _read_prompts(
    module: Any, cache: BatchCache, prompts: Sequence[np.ndarray], vocabulary: int
) -> Tensor:
    """Fill the cache; return the first token ``[b]`` after each prompt."""
    found = []
    for cache.row, prompt in enumerate(prompts):
        tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(module.device)
        positions = torch.arange(len(prompt), device=module.device)[None]
        found.append(_step(module, cache, tokens, positions, vocabulary))
    return torch.cat(found)


def _step(
    module: Any, cache: BatchCache, tokens: Tensor, positions: Tensor, vocabulary: int
) -> Tensor:
    """Return the most likely token ``[b]`` after ``tokens`` ``[b, n]``."""
    made = module(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    return made.logits[:, -1, :vocabulary].float().argmax(-1)


def before_stop(written: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    """Return the tokens before the first one that stops."""
    at = np.flatnonzero(np.isin(written, list(stop)))
    return written[: at[0]] if len(at) else written


@torch.inference_mode()
def generate_tokens(
    module: Any, prompt: np.ndarray, new_tokens: int, eos: int | list[int] | None = None
) -> np.ndarray:
    """Return what greedy decoding writes after a prompt ``[n]``: at most ``new_tokens`` tokens.

    Args:
        module: a model of transformers.
        eos: tokens that end generation early.
    """
    tokens = torch.from_numpy(prompt)[None].to(module.device)
    made = module.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].cpu().numpy()
