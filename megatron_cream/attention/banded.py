# SPDX-License-Identifier: Apache-2.0
"""Attention over bands: tiles by plain kernels, one softmax over all of them, exact gradients.

Memory is linear in the number of tokens: nothing but q, k, v, the output and one number per query
and head is kept for the backward pass, which rotates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_cream.attention import sdpa
from megatron_cream.attention.bands import Bands, Tile, TileShape
from megatron_cream.attention.sdpa import TileAttention
from megatron_cream.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Rotation:
    """How a position turns queries and keys.

    Attributes:
        inv_freq: float32 or float64 ``[d_rot / 2]``, radians per position.
        factor: multiplies cos and sin.
        interleaved: pairs are (0, 1), (2, 3) ... instead of (0, d_rot / 2) ...
    """

    inv_freq: Tensor
    factor: float = 1.0
    interleaved: bool = False

    @staticmethod
    def of(scaling: RopeScaling, like: Tensor, interleaved: bool = False) -> Rotation:
        """Return that of an interpolation, on a tensor's device, at least in float32."""
        wide = _wide(like)
        inv_freq = torch.as_tensor(scaling.inv_freq, dtype=wide, device=like.device)
        return Rotation(inv_freq, scaling.attention_factor, interleaved)

    def turn(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """Rotate ``x`` ``[b, h, n, d]`` by ``positions`` ``[n]`` or ``[b, 1, n]``.

        ``back`` is the transpose.
        """
        angles = positions.to(self.inv_freq.dtype)[..., None] * self.inv_freq
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        if back:
            sin = -sin
        if positions.dim() == 1 and _takes_triton(x):
            from megatron_cream.rope.rotation_kernel import turn

            table = torch.cat((cos, sin), dim=-1)[:, None, None]
            return turn(x.permute(2, 0, 1, 3), table, self.interleaved).permute(1, 2, 0, 3)
        rotated, rest = x.tensor_split([2 * len(self.inv_freq)], dim=-1)
        first, second = self._pairs(rotated.to(angles.dtype))
        turned = self._joined(first * cos - second * sin, second * cos + first * sin)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = x.chunk(2, dim=-1)
        return first, second

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((first, second), dim=-1).flatten(-2)
        return torch.cat((first, second), dim=-1)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: Bands,
    rotation: Rotation,
    scale: float,
    lengths: Sequence[int],
) -> Tensor:
    """Return attention ``[b, h, s, d]`` over ``bands`` of unrotated q and k.

    Args:
        q: ``[b, h, s, d]``.
        k, v: ``[b, g, s, d]``, g dividing h.
        scale: of the logits.
        lengths: tokens of the documents in each row of the batch; they sum to s, and each attends
            only to itself.
    """
    return _Banded.apply(q, k, v, bands, rotation, scale, tuple(lengths))


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bands: Bands,
        rotation: Rotation,
        scale: float,
        lengths: tuple[int, ...],
    ) -> Tensor:
        turned = _Turned(q, k, bands, rotation, _places(lengths, q.device))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=_wide(q), device=q.device)
        states = []
        for group in bands.of_documents(lengths):
            outputs = [_run(turned, v, tile, scale) for tile in group]
            _merge(out, lse, group, outputs)
            states.append([output.state for output in outputs])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = bands, rotation, scale, lengths, states
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        bands, rotation, scale, lengths, states = ctx.settings
        turned = _Turned(q, k, bands, rotation, _places(lengths, q.device))
        grads = [torch.zeros(x.shape, dtype=_wide(x), device=x.device) for x in (q, k, v)]
        for group, group_states in zip(bands.of_documents(lengths), states, strict=True):
            for tile, state in zip(group, group_states, strict=True):
                _pull_back(grads, (grad, out, lse), turned, v, tile, scale, state)
        return (*(g.to(q.dtype) for g in grads), None, None, None, None)


class _Turned:
    """Queries and keys of a tile, rotated as its band asks."""

    def __init__(
        self, q: Tensor, k: Tensor, bands: Bands, rotation: Rotation, places: Tensor
    ) -> None:
        self._q, self._k, self._bands, self._rotation = q, k, bands, rotation
        self._places = places
        # Bands that turn keys alike (all of dual chunk attention's) turn them once.
        self._keys: dict[Any, Tensor] = {}

    def query(self, tile: Tile) -> Tensor:
        rows = slice(*tile.rows)
        return self._rotation.turn(self._q[:, :, rows], self.query_positions(tile))

    def key(self, tile: Tile) -> Tensor:
        positions = self._bands.key_positions[tile.band]
        if positions not in self._keys:
            self._keys[positions] = self._rotation.turn(self._k, positions(self._places))
        return self._keys[positions][:, :, slice(*tile.columns)]

    def query_positions(self, tile: Tile) -> Tensor:
        return self._bands.query_positions[tile.band](self._places[slice(*tile.rows)])

    def key_positions(self, tile: Tile) -> Tensor:
        return self._bands.key_positions[tile.band](self._places[slice(*tile.columns)])

    def turn_back(self, gradient: Tensor, positions: Tensor) -> Tensor:
        return self._rotation.turn(gradient, positions, back=True)


def _run(turned: _Turned, v: Tensor, tile: Tile, scale: float) -> TileAttention:
    tensors = turned.query(tile), turned.key(tile), v[:, :, slice(*tile.columns)]
    mirrored = tile.shape is TileShape.ANTICAUSAL
    q, k, values = (_mirror(x, mirrored) for x in tensors)
    found = sdpa.forward(q, k, values, tile.shape is not TileShape.FULL, scale)
    out, lse = (_mirror(x, mirrored) for x in (found.out, found.lse))
    return TileAttention(out, lse, found.state)


def _merge(out: Tensor, lse: Tensor, group: Sequence[Tile], outputs: list[TileAttention]) -> None:
    """Write the one softmax over all tiles of a group into ``out`` and ``lse``."""
    first, end = min(t.rows[0] for t in group), max(t.rows[1] for t in group)
    if len(group) == 1:
        out[:, :, first:end], lse[:, :, first:end] = outputs[0].out, outputs[0].lse
        return
    if _takes_triton(out) and all(tile.rows == (first, end) for tile in group):
        from megatron_cream.attention.merge_kernel import merge

        parts = [found.out for found in outputs], [found.lse for found in outputs]
        merge(*parts, out[:, :, first:end], lse[:, :, first:end])
        return
    total = torch.full_like(lse[:, :, first:end], -torch.inf)
    for tile, output in zip(group, outputs, strict=True):
        rows = slice(tile.rows[0] - first, tile.rows[1] - first)
        total[:, :, rows] = torch.logaddexp(total[:, :, rows], output.lse)
    merged = torch.zeros_like(out[:, :, first:end], dtype=_wide(out))
    for tile, output in zip(group, outputs, strict=True):
        rows = slice(tile.rows[0] - first, tile.rows[1] - first)
        share = (output.lse - total[:, :, rows]).exp().unsqueeze(-1)
        merged[:, :, rows].addcmul_(output.out.to(merged.dtype), share)
    out[:, :, first:end], lse[:, :, first:end] = merged.to(out.dtype), total


def _pull_back(
    grads: list[Tensor],
    merged: tuple[Tensor, Tensor, Tensor],
    turned: _Turned,
    v: Tensor,
    tile: Tile,
    scale: float,
    state: tuple[Any, ...],
) -> None:
    """Add one tile's share of the gradients of q, k and v."""
    rows, columns = slice(*tile.rows), slice(*tile.columns)
    mirrored = tile.shape is TileShape.ANTICAUSAL
    grad, out, lse = (_mirror(x[:, :, rows], mirrored) for x in merged)
    tensors = turned.query(tile), turned.key(tile), v[:, :, columns]
    q, k, values = (_mirror(x, mirrored) for x in tensors)
    found = sdpa.backward(
        grad, q, k, values, out, lse, tile.shape is not TileShape.FULL, scale, state
    )
    dq, dk, dv = (_mirror(x, mirrored) for x in found)
    grads[0][:, :, rows] += turned.turn_back(dq, turned.query_positions(tile))
    grads[1][:, :, columns] += turned.turn_back(dk, turned.key_positions(tile))
    grads[2][:, :, columns] += dv


def _mirror(x: Tensor, mirrored: bool) -> Tensor:
    return x.flip(2) if mirrored else x


def _places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[s]``: each token's place in its document."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def _takes_triton(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and x.numel() < 2**31
        and find_spec("triton") is not None
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
