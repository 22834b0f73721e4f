# SPDX-License-Identifier: Apache-2.0
"""One softmax over several tiles of the same queries, in one pass of Triton over their outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of a program


def merge(outs: Sequence[Tensor], sums: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """Write the merged output ``[b, h, n, d]`` and log-sum-exp ``[b, h, n]`` into the last two.

    Args:
        outs: ``[b, h, n, d]`` of each tile.
        sums: log-sum-exp ``[b, h, n]`` of each, finite.
        out, lse: strided as they come; the last dimension of ``out`` contiguous.
    """
    b, h, n, d = out.shape
    outs, lses = _alike(outs), torch.stack(list(sums))
    _merge[(triton.cdiv(n, _ROWS), b * h)](
        tuple(outs), lses, out, lse, h, n,
        *outs[0].stride()[:3], *lses.stride(), *out.stride()[:3], *lse.stride(),
        D=d, D_BLOCK=triton.next_power_of_2(d), ROWS=_ROWS, TILES=len(outs), num_warps=4,
    )  # fmt: skip


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return them with equal strides, the last dimension contiguous."""
    # A batch of one steps over nothing, and kernels give it strides of their own.
    strides = {tensor.stride()[tensor.shape[0] == 1 :] for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


@triton.jit
def _merge(
    outs, sums, out, lse, heads, n,
    i_batch, i_head, i_row, s_tile, s_batch, s_head, s_row,
    o_batch, o_head, o_row, l_batch, l_head, l_row,
    D: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n
    first = sums + batch * s_batch + head * s_head + rows * s_row
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for tile in tl.static_range(TILES):
        highest = tl.maximum(highest, tl.load(first + tile * s_tile, mask=inside, other=0.0))
    column = tl.arange(0, D_BLOCK)
    there = inside[:, None] & (column < D)[None, :]
    source = batch * i_batch + head * i_head + rows[:, None] * i_row + column[None, :]
    weight = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, D_BLOCK), tl.float32)
    for tile in tl.static_range(TILES):
        share = tl.exp(tl.load(first + tile * s_tile, mask=inside, other=0.0) - highest)
        values = tl.load(outs[tile] + source, mask=there, other=0.0).to(tl.float32)
        merged += values * share[:, None]
        weight += share
    merged = merged / weight[:, None]
    target = batch * o_batch + head * o_head + rows[:, None] * o_row + column[None, :]
    tl.store(out + target, merged.to(out.dtype.element_ty), mask=there)
    total = highest + tl.log(weight)
    tl.store(lse + batch * l_batch + head * l_head + rows * l_row, total, mask=inside)
