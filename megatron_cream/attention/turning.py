# SPDX-License-Identifier: Apache-2.0
"""Turns queries and keys by their places, as the bands of an attention ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_cream.attention.bands import Bands, Tile
from megatron_cream.rope.scaling import RopeScaling


@dataclass(frozen=True, eq=False)
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
    def of(
        scaling: RopeScaling, like: Tensor, interleaved: bool = False, factor_in_scale: bool = False
    ) -> Rotation:
        """Return that of an interpolation, on a tensor's device, at least in float32.

        Equal ones are the same object, and so are their tables (``turning_of``).

        Args:
            factor_in_scale: the softmax scale has the attention factor in it, cos and sin do not.
        """
        return _rotation(scaling, like.device, wide(like), interleaved, factor_in_scale)

    def table(self, positions: Tensor) -> Tensor:
        """Return cosines and then sines ``[..., d_rot]`` of ``positions`` ``[...]``."""
        angles = positions.to(self.inv_freq.dtype)[..., None] * self.inv_freq
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.factor

    def turn(self, x: Tensor, table: Tensor, back: bool = False) -> Tensor:
        """Rotate ``x`` ``[b, h, n, d]`` by ``[n, d_rot]`` or ``[b, 1, n, d_rot]``.

        ``back`` is the transpose.
        """
        cos, sin = table.chunk(2, dim=-1)
        if back:
            sin = -sin
        rotated, rest = x.tensor_split([table.shape[-1]], dim=-1)
        first, second = self._pairs(rotated.to(table.dtype))
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


@lru_cache(maxsize=8)
def _rotation(
    scaling: RopeScaling,
    device: torch.device,
    kind: torch.dtype,
    interleaved: bool,
    factor_in_scale: bool,
) -> Rotation:
    # The host waits for a GPU to copy.
    inv_freq = torch.as_tensor(scaling.inv_freq, dtype=kind, device=device)
    return Rotation(inv_freq, 1.0 if factor_in_scale else scaling.attention_factor, interleaved)


class Turning:
    """Turns queries and keys of documents as their bands ask.

    A frame is one way to turn: bands that turn keys alike (all of dual chunk attention's) share it.

    Args:
        period: tokens after which positions begin anew, or of the longest document.
    """

    def __init__(self, bands: Bands, rotation: Rotation, period: int, device: torch.device) -> None:
        self._rotation, self._period = rotation, period
        places = torch.arange(period, device=device)
        frames = list(dict.fromkeys((*bands.query_positions, *bands.key_positions)))
        self.query_frames = [frames.index(at) for at in bands.query_positions]
        self._distinct = list(dict.fromkeys(frames.index(at) for at in bands.key_positions))
        self.key_frames = [frames.index(at) for at in bands.key_positions]
        # [frames, period, d_rot]
        self._tables = rotation.table(torch.stack([at(places) for at in frames]))
        # [1, d_rot], turns nothing.
        half = torch.ones_like(self._tables[0, :1, ::2])
        self._still = torch.cat((half, half - 1), dim=-1)

    def keys(self, k: Tensor) -> list[Tensor]:
        """Return a document's keys turned by each distinct frame of keys."""
        return [self.turn(k, 0, [frame])[0] for frame in self._distinct]

    def key(self, tile: Tile, keys: Sequence[Tensor]) -> Tensor:
        """Return those of a document's turned keys that a tile asks for."""
        return keys[self._distinct.index(self.key_frames[tile.band])]

    def turn(self, x: Tensor, place: int, frames: Sequence[int]) -> Sequence[Tensor]:
        """Return ``x`` ``[b, h, n, d]``, whose first token is at ``place``, by each frame."""
        tables = self._at(frames, place, x.shape[2])
        # Where several turnings of one tensor lie is a 32-bit offset.
        if takes_triton(x) and (len(frames) - 1) * x.numel() < 2**31:
            from megatron_cream.rope.rotation_kernel import turn

            by_row = tables[:, :, None, None]
            turned = turn(x.permute(2, 0, 1, 3), by_row, self._rotation.interleaved)
            return [one.permute(1, 2, 0, 3) for one in turned]
        return [self._rotation.turn(x, table) for table in tables]

    def turn_back(
        self, parts: Sequence[tuple[int | None, Tensor]], place: int, target: Tensor
    ) -> None:
        """Write the sum of gradients, each turned back by its frame if it has one.

        Args:
            parts: frames and ``[b, h, n, d]``, of tokens from ``place`` on.
            target: ``[b, h, n, d]``.
        """
        n = target.shape[2]
        if takes_triton(target):
            from megatron_cream.rope.rotation_kernel import turn_back

            tables = [
                (self._still.expand(n, -1) if frame is None else self._at([frame], place, n)[0])[
                    :, None, None
                ]
                for frame, _ in parts
            ]
            grads = [part.permute(2, 0, 1, 3) for _, part in parts]
            turn_back(grads, tables, target.permute(2, 0, 1, 3), self._rotation.interleaved)
            return
        total = torch.zeros(target.shape, dtype=wide(target), device=target.device)
        for frame, part in parts:
            grad = part.to(total.dtype)
            if frame is not None:
                grad = self._rotation.turn(grad, self._at([frame], place, n)[0], back=True)
            total += grad
        target.copy_(total)

    def _at(self, frames: Sequence[int], place: int, n: int) -> Tensor:
        """Return the tables ``[frames, n, d_rot]`` of n tokens from ``place`` on."""
        if len(frames) == 1 or list(frames) == list(range(frames[0], frames[-1] + 1)):
            tables = self._tables[frames[0] : frames[-1] + 1]
        else:
            tables = torch.stack([self._tables[frame] for frame in frames])
        first = place % self._period
        if first + n <= self._period:
            return tables[:, first : first + n]
        return tables[:, torch.arange(first, first + n, device=tables.device) % self._period]


@lru_cache(maxsize=1)
def turning_of(bands: Bands, rotation: Rotation, period: int, device: torch.device) -> Turning:
    """Return a turning, whose tables all layers of a model share."""
    return Turning(bands, rotation, period, device)


def takes_triton(x: Tensor) -> bool:
    """Return whether our kernels take a tensor: on a GPU, and no float64."""
    return x.is_cuda and x.dtype != torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def wide(x: Tensor) -> torch.dtype:
    """Return the type to compute in: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)
