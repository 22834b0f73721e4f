# SPDX-License-Identifier: Apache-2.0
"""Scaled dot product attention of one tile by torch, with the logarithm of the softmax's sum.

One softmax runs over several tiles: their outputs are merged by that sum, and a kernel's backward
pass that is handed the *merged* output and sum computes exactly its tile's share of the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_cream.errors import UserError

_aten = torch.ops.aten


class TileAttention(NamedTuple):
    """Of one tile: output ``[b, h, n, d]`` and log-sum-exp ``[b, h, n]``."""

    out: Tensor
    lse: Tensor


def require_type(dtype: torch.dtype, on_gpu: bool) -> None:
    """Check that there is a kernel for tensors of this type.

    Raises:
        UserError: there is none.
    """
    if on_gpu and dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            "attention beyond the window on a GPU has tensors of "
            f"{str(dtype).removeprefix('torch.')}: its kernels need --dtype bfloat16 or float16 "
            "(--bf16 or --fp16 of training)"
        )


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> TileAttention:
    """Return softmax(scale q k^T) v and the log-sum-exp of its logits, float32 or float64.

    Args:
        q: ``[b, h, n, d]``.
        k, v: ``[b, g, m, d]``, g dividing h.
        causal: query r sees keys 0..r; then n = m.
    """
    if not q.is_cuda:
        k, v = (_all_heads(x, q.shape[1]) for x in (k, v))
        return TileAttention(
            *_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        )
    if _takes_cudnn(q, k):
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return TileAttention(out, lse.reshape(q.shape[:3]))
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return TileAttention(out, lse[..., : q.shape[2]])


def backward(inputs: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of one tile.

    Args:
        inputs: gradient of the output, output and log-sum-exp of the *merged* attention at this
            tile's queries; q, k and v of the tile.
    """
    grad, out, lse, q, k, v = inputs
    lse = lse.contiguous()
    if not q.is_cuda:
        heads = k.shape[1]
        k, v = (_all_heads(x, q.shape[1]) for x in (k, v))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, _own_heads(dk, heads), _own_heads(dv, heads)
    # Nothing is dropped: the state of a random generator, which the kernels take, is not read.
    state = torch.empty(2, dtype=torch.int64, device=q.device).unbind()
    lengths = None, None, q.shape[2], k.shape[2]
    if _takes_cudnn(q, k):
        lse = lse.reshape(*lse.shape, *[1] * (_sum_dimensions() - 3))
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, *state, None, *lengths, 0.0, causal, scale=scale
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, *state, scale=scale
        )
    dq, dk, dv = found
    return dq, dk, dv


def _takes_cudnn(q: Tensor, k: Tensor) -> bool:
    """Return whether cuDNN's kernels surely take a tile; flash attention takes every other.

    The operators are called past the checks that PyTorch has before them: no single token, heads
    of at most 128 in multiples of 8, lengths from 64 on where cuDNN is old. Tiles that are shorter
    than a block of the kernels gain nothing by cuDNN, and its backward pass has crashed on them.
    """
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and min(q.shape[2], k.shape[2]) >= 128
        and q.shape[3] <= 128
        and q.shape[3] % 8 == 0
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
    )


@cache
def _sum_dimensions() -> int:
    """Return how many dimensions this PyTorch gives cuDNN's log-sum-exp: 3, or 4 with a 1."""
    x = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device="cuda")
    lse = _aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, False, False)[1]
    return int(lse.dim())


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _own_heads(grad: Tensor, heads: int) -> Tensor:
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
