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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_cream.rope.rotation_programs import turn_rows, turn_rows_back


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


def turn(x: Tensor, tables: Tensor, interleaved: bool = False) -> Tensor:
    """Return ``x`` ``[s, b, h, d]`` turned by each of ``[n, s, b or 1, 1, d_rot]``; no gradient.

    x is strided as it comes, and n times its elements are fewer than 2 ** 31.
    """
    turned, nothing = x.new_empty(len(tables), *x.shape), x[:, :, :0]
    _launch_forward(_separate(x), _separate(nothing), turned, nothing, tables, interleaved)
    return turned


def turn_back(
    grads: Sequence[Tensor], tables: Sequence[Tensor], target: Tensor, interleaved: bool = False
) -> None:
    """Write the sum of ``grads``, each turned back by a table of its own, in one launch.

    Args:
        grads: ``[s, b, h, d]``.
        tables: of each ``[s, b or 1, 1, d_rot]``, all with the same strides.
        target: ``[s, b, h, d]``, strided as it comes; the last dimension contiguous.
    """
    nothing = target[:, :, :0]
    queries = [_last_contiguous(grad) for grad in grads]
    _launch_backward(queries, nothing, None, _separate(target), _separate(nothing), None, tables,
                     interleaved)  # fmt: skip


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
        _launch_backward(queries, key, None, _separate(dq), _separate(dk), None,
                         tables.unbind(0), ctx.interleaved)  # fmt: skip
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
        _launch_backward([query], key, value, q, k, v, tables.unbind(0), interleaved, per_group=n)
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


def _sizes(table: Tensor, heads: int, d: int) -> dict[str, int]:
    """Compile-time sizes: powers of two that hold a head's pairs and what of it does not turn."""
    turning = table.shape[-1]
    half = triton.next_power_of_2(turning // 2)
    block = max(1, min(triton.next_power_of_2(heads), 2048 // half))
    return {
        "HALF": turning // 2,
        "HALF_BLOCK": half,
        "REST": d - turning,
        "REST_BLOCK": triton.next_power_of_2(max(1, d - turning)),
        "HEAD_BLOCK": block,
    }


def _table_strides(table: Tensor) -> tuple[int, int]:
    return table.stride(0), table.stride(1) if table.shape[1] > 1 else 0


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of ``[s, b, h, d]`` where there is something to step over."""
    s, b, h = (
        stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
    )
    return s, b, h


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
    turn_rows[(s * b,)](
        q.tensor, k.tensor, turned, keys, tables, b,
        *q[1:], *k[1:], turned.stride(0), tables.stride(0), *_table_strides(tables[0]),
        h, keys.shape[2], d, PER_GROUP=per_group, TURNS=turns, INTERLEAVED=interleaved,
        **_sizes(tables[0], h, d), num_warps=4,
    )  # fmt: skip


def _launch_backward(
    queries: list[Tensor],
    key: Tensor,
    value: Tensor | None,
    dq: Heads,
    dk: Heads,
    dv: Heads | None,
    tables: Sequence[Tensor],
    interleaved: bool,
    per_group: int = 1,
) -> None:
    s, b, g, d = key.shape
    h = queries[0].shape[2]
    # Gradients of several turnings come apart; their strides must agree for one launch.
    if len({_strides(x) for x in queries}) > 1:
        queries = [x.contiguous() for x in queries]
    turn_rows_back[(s * b,)](
        tuple(queries), key, key if value is None else value,
        dq.tensor, dk.tensor, dk.tensor if dv is None else dv.tensor, tuple(tables), b,
        *_strides(queries[0]), *key.stride()[:3],
        *(key if value is None else value).stride()[:3],
        *dq[1:], *dk[1:], *_table_strides(tables[0]),
        h, g, D=d, PER_GROUP=per_group, TURNS=len(queries), INTERLEAVED=interleaved,
        VALUES=value is not None, VALUE_BLOCK=triton.next_power_of_2(d),
        **_sizes(tables[0], h, d), num_warps=4,
    )  # fmt: skip
