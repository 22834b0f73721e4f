# SPDX-License-Identifier: Apache-2.0
"""Decodes greedily, several prompts at once, with keys and values kept, in any model whose
attention is ``forward``'s.

Prompts are computed one after the other, each without padding, as if it stood alone. Their keys and
values lie in one buffer per layer in which all prompts end together; then every step writes one
token of each. Where a shorter prompt has nothing yet, nothing is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_cream.evaluation.forward import KEYS_MULTIPLE, KeysSeen, keeping, seeing

Step = Callable[[Tensor, Tensor], Tensor]
"""Tokens and their positions ``[b, n]`` to the most likely token ``[b]`` after the last."""

_MOST_ROWS = 256  # prompts that are answered together; a killed run does so many again
_CPU_MEMORY = 2**31  # bytes of keys and values


class KeptKeys:
    """Keys and values of b sequences, ``[b, g, size, d]`` per layer; a ``forward.KeyKeeper``.

    Args:
        lengths: tokens of each prompt.
        new_tokens: most tokens that are written after any.

    Attributes:
        row: which prompt is being computed; None while tokens are written after all of them.
        size: columns, of which the last are never used.
        seen: which of them each sequence sees.
    """

    def __init__(self, lengths: Sequence[int], new_tokens: int, device: torch.device | str) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.size = -(-(self.longest + new_tokens) // KEYS_MULTIPLE) * KEYS_MULTIPLE
        self.row: int | None = None
        self.seen = KeysSeen(lengths, self.size, device)
        self._kept: dict[object, tuple[Tensor, Tensor]] = {}

    def update(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what is new; return keys and values ``[b, g, n, d]`` to attend to."""
        new = (key, value)
        if layer not in self._kept:
            # Zeros, since what is not seen is still multiplied, by 0.
            keys, values = (
                x.new_zeros(len(self.lengths), x.shape[1], self.size, x.shape[3]) for x in new
            )
            self._kept[layer] = keys, values
        kept = self._kept[layer]
        if self.row is not None:
            place = slice(self.longest - self.lengths[self.row], self.longest)
            for buffer, values in zip(kept, new, strict=True):
                buffer[self.row, :, place] = values[0]
            return new
        for buffer, values in zip(kept, new, strict=True):
            buffer[:, :, self.seen.tokens - 1] = values[:, :, 0]
        return kept


# cuDNN's attention plans anew for every length that it has not seen: no two prompts have the same.
_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.inference_mode()
def decode(
    step: Step,
    prompts: Sequence[np.ndarray],
    most: int,
    device: torch.device | str,
    share: Callable[[Tensor], None] = lambda best: None,
) -> Iterator[Tensor]:
    """Yield the tokens ``[b]`` that greedy decoding writes after all prompts, ``most`` times.

    Args:
        step: of the model.
        prompts: int64 ``[n]`` each.
        share: gives every rank of a model the tokens of that which made them, in place. Prompts
            are read without: stages of a pipeline then work on several at a time.
    """
    cache = KeptKeys([len(prompt) for prompt in prompts], most, device)
    found = []
    with sdpa_kernel(_ANY_LENGTH), keeping(cache):
        for cache.row, prompt in enumerate(prompts):
            tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
            found.append(step(tokens, torch.arange(len(prompt), device=device)[None]))
    best = torch.cat(found)
    cache.row = None
    positions = torch.tensor(cache.lengths, device=device)[:, None]
    for written in range(most):
        if written:
            cache.seen.see_next()
            with sdpa_kernel(_ANY_LENGTH), keeping(cache), seeing(cache.seen):
                best = step(best[:, None], positions)
            positions = positions + 1
        share(best)
        yield best


def collect(
    tokens: Iterator[Tensor], new_tokens: Sequence[int], stop: Sequence[int]
) -> list[np.ndarray]:
    """Return what ``decode`` writes after each prompt, without the token that stops it.

    Args:
        new_tokens: most tokens to write after each.
        stop: tokens that end an answer.
    """
    written: list[Tensor] = []
    for best in tokens:
        written.append(best)
        if len(written) == 1:
            ends = torch.tensor(list(stop), device=best.device)
            limits = torch.tensor(new_tokens, device=best.device)
            done = torch.zeros_like(best, dtype=torch.bool)
        done |= torch.isin(best, ends)
        if (done | (limits <= len(written))).all():
            break
    rows = torch.stack(written, dim=1).cpu().numpy()
    return [before_stop(row[:most], stop) for row, most in zip(rows, new_tokens, strict=True)]


def batch_size(lengths: Sequence[int], new_tokens: int, kept_tokens: int) -> int:
    """Return how many prompts go together: batches alike, whose keys and values fit.

    Args:
        lengths: tokens of each prompt.
        new_tokens: most tokens that are written after any.
        kept_tokens: for how many tokens there is memory, as ``kept_tokens`` says.
    """
    tokens = max(lengths, default=0) + new_tokens + KEYS_MULTIPLE
    most = max(1, min(_MOST_ROWS, kept_tokens // tokens))
    return -(-len(lengths) // max(1, -(-len(lengths) // most))) or 1


def kept_tokens(layers: int, heads: int, dim: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """Return for how many tokens keys and values fit half of the GPU's free memory, or 2 GiB.

    Args:
        layers, heads, dim: layers, heads of keys and their dimensions on this rank.
    """
    one = 2 * layers * heads * dim * dtype.itemsize
    return (_free_on_gpu() // 2 if on_gpu else _CPU_MEMORY) // one


def _free_on_gpu() -> int:
    """Return free bytes, those that PyTorch holds for what it makes next among them."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + held


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
