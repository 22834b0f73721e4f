# SPDX-License-Identifier: Apache-2.0
"""Rotation of queries and keys in one launch of Triton, from a table made once per step.

A table holds, for every token, the cosines and then the sines of its angles: ``[s, b, 1, d_rot]``,
float32, of the same shape as Megatron's angles, with the attention factor multiplied in. Queries
may be turned several ways in one pass, each by a table of its own (dual chunk attention). Strided
inputs are read as they are, also the one tensor that holds q, k and v by groups, whose gradient is
written in one piece.

Exact on a GPU against float64 (``tests/rope/rotation_interpreted.py cuda``), 1.4 to 1.9 times as
fast as Transformer Engine's kernel (docs/performance.md). Training uses it (``extras/rotation``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def table(angles: Tensor, factor: float = 1.0, interleaved: bool = False) -> Tensor:
    """Return the table of angles ``[s, b, 1, d_rot]`` in which each stands twice.

    Args:
        angles: Megatron's, in halves, or with ``interleaved`` in pairs.
        factor: multiplies cosines and sines.
    """
    half = (angles[..., ::2] if interleaved else angles[..., : angles.shape[-1] // 2]).float()
    return torch.cat((half.cos() * factor, half.sin() * factor), dim=-1)


class Heads(NamedTuple):
    """Where the heads of a tensor lie: strides in elements; the last dimension is contiguous.

    Head h of row (i, j) begins at ``i * outer + j * inner + (h // per_group) * group +
    (h % per_group) * head``.
    """

    tensor: Tensor
    outer: int
    inner: int
    group: int
    head: int


def rotate(q: Tensor, k: Tensor, tables: Tensor, interleaved: bool = False) -> tuple[Tensor, ...]:
    """Return q turned by each of ``tables``, and k turned by the first of them.

    Args:
        q: ``[s, b, h, d]``, strided as it comes; the last dimension contiguous.
        k: ``[s, b, g, d]``, likewise.
        tables: ``[s, b or 1, 1, d_rot]``, or several ``[n, s, b or 1, 1, d_rot]``: the first for
            k and q, the others for q.
        interleaved: pairs are (0, 1), (2, 3) ...
    """
    several = tables if tables.dim() == 5 else tables.unsqueeze(0)
    turned: tuple[Tensor, ...] = _Rotate.apply(q, k, several, interleaved)
    return turned


def turn(x: Tensor, table: Tensor, interleaved: bool = False) -> Tensor:
    """Return ``x`` ``[s, b, h, d]`` turned by ``[s, b or 1, 1, d_rot]``; it has no gradient.

    x is strided as it comes, and has fewer than 2 ** 31 elements.
    """
    turned, nothing = x.new_empty(1, *x.shape), x[:, :, :0]
    _launch_forward(
        _separate(x), _separate(nothing), turned, nothing, table.unsqueeze(0), interleaved
    )
    return turned[0]


def rotate_mixed(
    mixed: Tensor, tables: Tensor, queries_per_group: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated q ``[s, b, h, d]`` and k ``[s, b, g, d]``, and v as it lies in ``mixed``.

    Args:
        mixed: ``[s, b, g, (n + 2) d]``: of each group its n queries, its key and its value.
        tables: ``[s, b or 1, 1, d_rot]``.
        queries_per_group: n.
    """
    q, k, v = _RotateMixed.apply(mixed, tables.unsqueeze(0), queries_per_group, interleaved)
    return q, k, v


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, tables: Tensor, interleaved: bool
    ) -> tuple[Tensor, ...]:
        turned = q.new_empty(len(tables), *q.shape)
        keys = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        _launch_forward(_separate(q), _separate(k), turned, keys, tables, interleaved)
        ctx.save_for_backward(tables)
        ctx.interleaved = interleaved
        return (*turned.unbind(0), keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tables,) = ctx.saved_tensors
        *queries, key = (_last_contiguous(grad) for grad in grads)
        dq = torch.empty(queries[0].shape, dtype=key.dtype, device=key.device)
        dk = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        _launch_backward(queries, key, None, _separate(dq), _separate(dk), None, tables,
                         ctx.interleaved)  # fmt: skip
        return dq, dk, None, None


class _RotateMixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, tables: Tensor, n: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, g, width = mixed.shape
        d = width // (n + 2)
        q, k, v = _inside(mixed, n, d)
        turned = mixed.new_empty(1, s, b, g * n, d)
        keys = mixed.new_empty(s, b, g, d)
        _launch_forward(q, k, turned, keys, tables, interleaved, per_group=n)
        ctx.save_for_backward(tables)
        ctx.settings = n, d, interleaved
        return turned[0], keys, v.tensor

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        (tables,) = ctx.saved_tensors
        n, d, interleaved = ctx.settings
        s, b, g = dk.shape[:3]
        mixed = dk.new_empty(s, b, g, (n + 2) * d)
        q, k, v = _inside(mixed, n, d)
        grads = (_last_contiguous(x) for x in (dq, dk, dv))
        query, key, value = grads
        _launch_backward([query], key, value, q, k, v, tables, interleaved, per_group=n)
        return mixed, None, None, None


def _separate(x: Tensor) -> Heads:
    x = _last_contiguous(x)
    return Heads(x, x.stride(0), x.stride(1), x.stride(2), 0)


def _inside(mixed: Tensor, n: int, d: int) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values inside ``mixed``."""
    by_head = mixed.view(*mixed.shape[:-1], n + 2, d)
    strides = mixed.stride(0), mixed.stride(1), mixed.stride(2)
    return (
        Heads(by_head[..., :n, :], *strides, d),
        Heads(by_head[..., n, :], *strides, 0),
        Heads(by_head[..., n + 1, :], *strides, 0),
    )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(tables: Tensor, heads: int, d: int) -> dict[str, int]:
    """Compile-time sizes: powers of two that hold a head's pairs and what of it does not turn."""
    turning = tables.shape[-1]
    half = triton.next_power_of_2(turning // 2)
    block = max(1, min(triton.next_power_of_2(heads), 2048 // half))
    return {
        "HALF": turning // 2,
        "HALF_BLOCK": half,
        "REST": d - turning,
        "REST_BLOCK": triton.next_power_of_2(max(1, d - turning)),
        "HEAD_BLOCK": block,
    }


def _table_strides(tables: Tensor) -> tuple[int, int, int]:
    inner = tables.stride(2) if tables.shape[2] > 1 else 0
    return tables.stride(0), tables.stride(1), inner


def _launch_forward(
    q: Heads,
    k: Heads,
    turned: Tensor,
    keys: Tensor,
    tables: Tensor,
    interleaved: bool,
    per_group: int = 1,
) -> None:
    turns, s, b, h, d = turned.shape
    _forward[(s * b,)](
        q.tensor, k.tensor, turned, keys, tables, b,
        *q[1:], *k[1:], turned.stride(0), *_table_strides(tables),
        h, keys.shape[2], d, PER_GROUP=per_group, TURNS=turns, INTERLEAVED=interleaved,
        **_sizes(tables, h, d), num_warps=4,
    )  # fmt: skip


def _launch_backward(
    queries: list[Tensor],
    key: Tensor,
    value: Tensor | None,
    dq: Heads,
    dk: Heads,
    dv: Heads | None,
    tables: Tensor,
    interleaved: bool,
    per_group: int = 1,
) -> None:
    s, b, g, d = key.shape
    h = queries[0].shape[2]
    # Gradients of several turnings come apart; their strides must agree for one launch.
    if any(x.stride() != queries[0].stride() for x in queries):
        queries = [x.contiguous() for x in queries]
    _backward[(s * b,)](
        tuple(queries), key, key if value is None else value,
        dq.tensor, dk.tensor, dk.tensor if dv is None else dv.tensor, tables, b,
        *queries[0].stride()[:3], *key.stride()[:3],
        *(key if value is None else value).stride()[:3],
        *dq[1:], *dk[1:], *_table_strides(tables),
        h, g, D=d, PER_GROUP=per_group, TURNS=len(queries), INTERLEAVED=interleaved,
        VALUES=value is not None, VALUE_BLOCK=triton.next_power_of_2(d),
        **_sizes(tables, h, d), num_warps=4,
    )  # fmt: skip


@triton.jit
def _places(heads, group, head, PER_GROUP: tl.constexpr):
    """Where each of ``heads`` begins in its row."""
    return (heads // PER_GROUP) * group + (heads % PER_GROUP) * head


@triton.jit
def _turn_heads(
    source, target, cos, sin, heads, count, source_places, target_places, d,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn some heads of one row; what of a head does not turn is copied."""
    pair = tl.arange(0, HALF_BLOCK)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    inside = (heads < count)[:, None] & (pair < HALF)[None, :]
    at = source_places[:, None] + (pair * step)[None, :]
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + at + gap, mask=inside, other=0.0).to(tl.float32)
    to = target_places[:, None] + (pair * step)[None, :]
    kind = target.dtype.element_ty
    tl.store(target + to, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(target + to + gap, (second * cos + first * sin).to(kind), mask=inside)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)
        there = (heads < count)[:, None] & (rest < REST)[None, :]
        values = tl.load(source + source_places[:, None] + 2 * HALF + rest[None, :], mask=there)
        tl.store(target + target_places[:, None] + 2 * HALF + rest[None, :], values, mask=there)


@triton.jit
def _forward(
    q, k, turned, keys, tables, inner_rows,
    q_outer, q_inner, q_group, q_head, k_outer, k_inner, k_group, k_head,
    turn_stride, table_turn, table_outer, table_inner,
    query_heads, key_heads, d,
    PER_GROUP: tl.constexpr, TURNS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the queries of one row by each table and its keys by the first."""
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // inner_rows, row % inner_rows
    pair = tl.arange(0, HALF_BLOCK)
    for turn in tl.static_range(TURNS):
        angles = tables + turn * table_turn + outer * table_outer + inner * table_inner
        cos = tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
        sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
        for begin in range(0, query_heads, HEAD_BLOCK):
            heads = begin + tl.arange(0, HEAD_BLOCK)
            _turn_heads(
                q + outer * q_outer + inner * q_inner,
                turned + turn * turn_stride + row * query_heads * d,
                cos, sin, heads, query_heads,
                _places(heads, q_group, q_head, PER_GROUP), heads * d, d,
                HALF, HALF_BLOCK, REST, REST_BLOCK, INTERLEAVED,
            )  # fmt: skip
        if turn == 0:
            for begin in range(0, key_heads, HEAD_BLOCK):
                heads = begin + tl.arange(0, HEAD_BLOCK)
                _turn_heads(
                    k + outer * k_outer + inner * k_inner, keys + row * key_heads * d,
                    cos, sin, heads, key_heads, heads * k_group, heads * d, d,
                    HALF, HALF_BLOCK, REST, REST_BLOCK, INTERLEAVED,
                )  # fmt: skip


@triton.jit
def _pull_back(
    grad, angles, heads, count, places,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return the pairs of some heads' gradient, turned back."""
    pair = tl.arange(0, HALF_BLOCK)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    cos = tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    inside = (heads < count)[:, None] & (pair < HALF)[None, :]
    at = places[:, None] + (pair * step)[None, :]
    first = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grad + at + gap, mask=inside, other=0.0).to(tl.float32)
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def _store_pairs(
    target, heads, count, places, first, second,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF_BLOCK)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    inside = (heads < count)[:, None] & (pair < HALF)[None, :]
    to = places[:, None] + (pair * step)[None, :]
    kind = target.dtype.element_ty
    tl.store(target + to, first.to(kind), mask=inside)
    tl.store(target + to + gap, second.to(kind), mask=inside)


@triton.jit
def _load_rest(
    grad, heads, count, places, BEGIN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    rest = tl.arange(0, BLOCK)
    there = (heads < count)[:, None] & (rest < SIZE)[None, :]
    return tl.load(grad + places[:, None] + BEGIN + rest[None, :], mask=there, other=0.0)


@triton.jit
def _store_rest(
    target, heads, count, places, values,
    BEGIN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rest = tl.arange(0, BLOCK)
    there = (heads < count)[:, None] & (rest < SIZE)[None, :]
    kind = target.dtype.element_ty
    tl.store(target + places[:, None] + BEGIN + rest[None, :], values.to(kind), mask=there)


@triton.jit
def _backward_keys(
    grad, grad_value, dk, dv, angles, key_heads, gk_head, gv_head, k_group,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the gradients of the keys of one row back; those of its values are copied."""
    for begin in range(0, key_heads, HEAD_BLOCK):
        heads = begin + tl.arange(0, HEAD_BLOCK)
        places = heads * k_group
        first, second = _pull_back(
            grad, angles, heads, key_heads, heads * gk_head, HALF, HALF_BLOCK, INTERLEAVED
        )
        _store_pairs(dk, heads, key_heads, places, first, second, HALF, HALF_BLOCK, INTERLEAVED)
        if REST > 0:
            rest = _load_rest(grad, heads, key_heads, heads * gk_head, 2 * HALF, REST, REST_BLOCK)
            _store_rest(dk, heads, key_heads, places, rest, 2 * HALF, REST, REST_BLOCK)
        if VALUES:
            value = _load_rest(grad_value, heads, key_heads, heads * gv_head, 0, D, VALUE_BLOCK)
            _store_rest(dv, heads, key_heads, places, value, 0, D, VALUE_BLOCK)


@triton.jit
def _backward(
    grads, grad_key, grad_value, dq, dk, dv, tables, inner_rows,
    g_outer, g_inner, g_head, gk_outer, gk_inner, gk_head, gv_outer, gv_inner, gv_head,
    q_outer, q_inner, q_group, q_head, k_outer, k_inner, k_group, k_head,
    table_turn, table_outer, table_inner, query_heads, key_heads,
    D: tl.constexpr, PER_GROUP: tl.constexpr, TURNS: tl.constexpr, INTERLEAVED: tl.constexpr,
    VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the gradients of one row back; those of several turnings of the queries add up."""
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // inner_rows, row % inner_rows
    angles = tables + outer * table_outer + inner * table_inner
    target = dq + outer * q_outer + inner * q_inner
    for begin in range(0, query_heads, HEAD_BLOCK):
        heads = begin + tl.arange(0, HEAD_BLOCK)
        first = tl.zeros((HEAD_BLOCK, HALF_BLOCK), tl.float32)
        second = tl.zeros((HEAD_BLOCK, HALF_BLOCK), tl.float32)
        rest = tl.zeros((HEAD_BLOCK, REST_BLOCK), tl.float32)
        for turn in tl.static_range(TURNS):
            grad = grads[turn] + outer * g_outer + inner * g_inner
            more, other = _pull_back(
                grad, angles + turn * table_turn, heads, query_heads, heads * g_head,
                HALF, HALF_BLOCK, INTERLEAVED,
            )  # fmt: skip
            first += more
            second += other
            if REST > 0:
                rest += _load_rest(
                    grad, heads, query_heads, heads * g_head, 2 * HALF, REST, REST_BLOCK
                )
        places = _places(heads, q_group, q_head, PER_GROUP)
        _store_pairs(
            target, heads, query_heads, places, first, second, HALF, HALF_BLOCK, INTERLEAVED
        )
        if REST > 0:
            _store_rest(target, heads, query_heads, places, rest, 2 * HALF, REST, REST_BLOCK)
    key_row = outer * k_outer + inner * k_inner
    _backward_keys(
        grad_key + outer * gk_outer + inner * gk_inner,
        grad_value + outer * gv_outer + inner * gv_inner,
        dk + key_row, dv + key_row, angles, key_heads, gk_head, gv_head, k_group,
        D, INTERLEAVED, VALUES, VALUE_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK, HEAD_BLOCK,
    )  # fmt: skip
