# SPDX-License-Identifier: Apache-2.0
"""The Triton programs of ``rotation_kernel``: one row, a token of a sample, for each of them."""

from __future__ import annotations

import triton
import triton.language as tl


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
def turn_rows(
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
def turn_rows_back(
    grads, grad_key, grad_value, dq, dk, dv, tables, inner_rows,
    g_outer, g_inner, g_head, gk_outer, gk_inner, gk_head, gv_outer, gv_inner, gv_head,
    q_outer, q_inner, q_group, q_head, k_outer, k_inner, k_group, k_head,
    table_outer, table_inner, query_heads, key_heads,
    D: tl.constexpr, PER_GROUP: tl.constexpr, TURNS: tl.constexpr, INTERLEAVED: tl.constexpr,
    VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the gradients of one row back; those of several turnings of the queries add up."""
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // inner_rows, row % inner_rows
    angles = outer * table_outer + inner * table_inner
    target = dq + outer * q_outer + inner * q_inner
    for begin in range(0, query_heads, HEAD_BLOCK):
        heads = begin + tl.arange(0, HEAD_BLOCK)
        first = tl.zeros((HEAD_BLOCK, HALF_BLOCK), tl.float32)
        second = tl.zeros((HEAD_BLOCK, HALF_BLOCK), tl.float32)
        rest = tl.zeros((HEAD_BLOCK, REST_BLOCK), tl.float32)
        for turn in tl.static_range(TURNS):
            grad = grads[turn] + outer * g_outer + inner * g_inner
            more, other = _pull_back(
                grad, tables[turn] + angles, heads, query_heads, heads * g_head,
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
        dk + key_row, dv + key_row, tables[0] + angles, key_heads, gk_head, gv_head, k_group,
        D, INTERLEAVED, VALUES, VALUE_BLOCK, HALF, HALF_BLOCK, REST, REST_BLOCK, HEAD_BLOCK,
    )  # fmt: skip
