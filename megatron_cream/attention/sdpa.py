# SPDX-License-Identifier: Apache-2.0
"""Scaled dot product attention of one tile by torch, with the logarithm of the softmax's sum.

One softmax runs over several tiles: their outputs are merged by that sum, and a kernel's backward
pass that is handed the *merged* output and sum computes exactly its tile's share of the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class TileAttention(NamedTuple):
    """Of one tile: output ``[b, h, n, d]``, log-sum-exp ``[b, h, n]`` and the kernel's state."""

    out: Tensor
    lse: Tensor
    state: tuple[Any, ...]


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> TileAttention:
    """Return softmax(scale q k^T) v and the log-sum-exp of its logits, float32 or float64.

    Args:
        q: ``[b, h, n, d]``.
        k, v: ``[b, g, m, d]``, g dividing h.
        causal: query r sees keys 0..r; then n = m.
    """
    k, v = (_all_heads(x, q.shape[1]) for x in (k, v))
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return TileAttention(out, lse, ())
    if _takes_cudnn(q):
        out, lse, *state = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return TileAttention(out, lse.reshape(q.shape[:3]), ("cudnn", *state[:6]))
    out, lse, *state = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return TileAttention(out, lse[..., : q.shape[2]], ("flash", *state[:6]))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    state: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of one tile.

    Args:
        grad, out, lse: of the *merged* attention at this tile's queries.
        state: the tile's own, of ``forward``.
    """
    heads = k.shape[1]
    k, v = (_all_heads(x, q.shape[1]) for x in (k, v))
    if not state:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif state[0] == "cudnn":
        cum_q, cum_k, max_q, max_k, seed, offset = state[1:]
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), seed, offset, None, cum_q, cum_k,
            max_q, max_k, 0.0, causal, scale=scale,
        )  # fmt: skip
    else:
        cum_q, cum_k, max_q, max_k, seed, offset = state[1:]
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
    dq, dk, dv = grads
    return dq, _own_heads(dk, heads), _own_heads(dv, heads)


def _takes_cudnn(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and torch.backends.cuda.cudnn_sdp_enabled()


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _own_heads(grad: Tensor, heads: int) -> Tensor:
    if grad.shape[1] == heads:
        return grad
    return grad.unflatten(1, (heads, -1)).sum(
        2, dtype=torch.promote_types(grad.dtype, torch.float32)
    )
