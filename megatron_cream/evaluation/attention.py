# SPDX-License-Identifier: Apache-2.0
"""Causal attention over a context and the tails that continue it, in memory linear in length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# (number of tails, tokens of each) of the pass that is running.
_shape: ContextVar[tuple[int, int]] = ContextVar("tails", default=(0, 0))


@contextmanager
def tails(count: int, tokens: int) -> Iterator[None]:
    """Have ``attend`` take the last ``count * tokens`` tokens for tails."""
    before = _shape.set((count, tokens))
    try:
        yield
    finally:
        _shape.reset(before)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention ``[b, h, n, d]``; keys and values ``[b, g, n, d]`` may have fewer heads.

    The context attends causally, without a mask. The tails' mask is ``[k * t, n]``: linear in n,
    since tails are short.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    count, tokens = _shape.get()
    if count < 2:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    context = query.shape[2] - count * tokens
    before = scaled_dot_product_attention(
        *(x[:, :, :context] for x in (query, key, value)), is_causal=True, scale=scale
    )
    mask = tail_mask(context, count, tokens, query.device, query.dtype)
    after = scaled_dot_product_attention(
        query[:, :, context:], key, value, attn_mask=mask, scale=scale
    )
    return torch.cat([before, after], dim=2)


@lru_cache(maxsize=1)  # all layers of a pass ask for the same one
def tail_mask(
    context: int, count: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return what is added to logits ``[count * tokens, context + count * tokens]``: 0 or -inf.

    A tail sees the context and, causally, itself.
    """
    inside = torch.full((tokens, tokens), -torch.inf, device=device, dtype=dtype).triu(1)
    mask = torch.full((count * tokens,) * 2, -torch.inf, device=device, dtype=dtype)
    for i in range(count):
        own = slice(i * tokens, (i + 1) * tokens)
        mask[own, own] = inside
    seen = torch.zeros(count * tokens, context, device=device, dtype=dtype)
    return torch.cat([seen, mask], dim=1)
