# SPDX-License-Identifier: Apache-2.0
"""Cuts causal attention into bands, as tiles: which query sees which key at which distance.

Rotary attention knows a distance only as the difference of the positions that a query and a key
are turned by. Dual chunk attention, STRING and SelfExtend give near and far pairs other positions:
each is two or three *bands*, and a band is covered by *tiles*, rectangles of queries and keys for
which a plain attention kernel exists. The softmax runs over all tiles of a query together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from megatron_cream.errors import UserError


class TileShape(Enum):
    """Which pairs of a tile attend; row r and column c count from its corner."""

    FULL = "all"
    CAUSAL = "c <= r"
    ANTICAUSAL = "c >= r"


@dataclass(frozen=True)
class Tile:
    """Queries ``[first_row, end_row)`` and keys ``[first_column, end_column)`` of one band.

    A tile that is not ``FULL`` is a square. It can stand for ``count`` tiles, each ``step`` tokens
    behind the one before in rows and in columns.
    """

    band: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: TileShape
    count: int = 1
    step: int = 0

    def singles(self) -> list[Tile]:
        """Return the tiles that it stands for."""
        first, end, first_column, end_column = *self.rows, *self.columns
        steps = [i * self.step for i in range(self.count)]
        return [
            Tile(self.band, (first + i, end + i), (first_column + i, end_column + i), self.shape)
            for i in steps
        ]


def joined(tiles: Iterable[Tile], most: int) -> list[Tile]:
    """Return single tiles, up to ``most`` that are alike and behind each other as one."""
    found: list[Tile] = []
    last: dict[tuple[int, ...], int] = {}
    for tile in tiles:
        kind = tile.band, tile.rows[1] - tile.rows[0], tile.columns[1] - tile.columns[0]
        at = last.get(kind, -1)
        if at >= 0:
            first = found[at]
            step = first.step or tile.rows[0] - first.rows[0]
            whole = replace(first, count=first.count + 1, step=step)
            if step > 0 and whole.count <= most and whole.singles()[-1] == tile:
                found[at] = whole
                continue
        last[kind] = len(found)
        found.append(tile)
    return found


@dataclass(frozen=True)
class Bands:
    """A causal attention as bands.

    Attributes:
        query_positions, key_positions: of each band, from tokens' places in their document
            (int64 ``[n]``) to the positions they are turned by.
        band_of: of a query's and a key's place, the band of the pair.
        tiles: of the queries at places ``[first, end)``, tiles that hold every pair once: large
            ones first, those of the same tokens soon after each other.
        period: tokens after which ``query_positions`` and ``key_positions`` begin anew, or None.
        original_length: tokens up to which logits are as they are; 0 for any length.
    """

    query_positions: tuple[Callable[[Tensor], Tensor], ...]
    key_positions: tuple[Callable[[Tensor], Tensor], ...]
    band_of: Callable[[Tensor, Tensor], Tensor]
    tiles: Callable[[int, int], Iterable[Tile]]
    period: int | None = None
    original_length: int = 0

    def logit_factor(self, tokens: int) -> float:
        """Return what multiplies the logits of a text of ``tokens`` tokens.

        It is max(1, 0.1 ln(tokens / original) + 1) squared: engines multiply the stored keys by it
        and the softmax scale by it once more (SGLang, dual_chunk_flashattention_backend.py).
        """
        if not self.original_length:
            return 1.0
        return max(1.0, 0.1 * math.log(tokens / self.original_length) + 1.0) ** 2


@lru_cache(maxsize=64)
def dual_chunk(
    chunk_size: int, local_size: int, original_max_position_embeddings: int = 0
) -> Bands:
    """Return dual chunk attention's bands: the own chunk, the one before, all earlier ones.

    Chunks have a stride of S = ``chunk_size - local_size`` tokens. Keys stand at j mod S in all
    bands; queries at i mod S for their own chunk, min(i mod S + S, Q) for the one before, which
    keeps the nearest distances exact, and Q = ``chunk_size`` for all earlier ones.

    ChunkLlama takes a ``chunk_size`` of 3/4 and a ``local_size`` of 1/8 of the trained window;
    Qwen's ``dual_chunk_attention_config`` names all three; the last is of ``logit_factor``.

    Raises:
        UserError: a size is out of range.
    """
    stride = chunk_size - local_size
    if original_max_position_embeddings < 0:
        raise UserError(
            f"original_max_position_embeddings is {original_max_position_embeddings}: it must be "
            "at least 0 tokens"
        )
    if local_size < 0 or stride < 1:
        raise UserError(
            f"local_size is {local_size}, chunk_size {chunk_size}: local_size must be at least 0 "
            "and less than chunk_size"
        )
    if local_size > stride:
        raise UserError(
            f"local_size is {local_size}, chunk_size {chunk_size}: it must be at most half of "
            "chunk_size, or far keys would stand further away than they are"
        )

    def key(place: Tensor) -> Tensor:
        return place % stride

    return Bands(
        (
            key,
            lambda place: (place % stride + stride).clamp(max=chunk_size),
            lambda place: torch.full_like(place, chunk_size),
        ),
        (key, key, key),
        lambda query, key: (query // stride - key // stride).clamp(max=2),
        lambda first, end: _chunk_tiles(first, end, stride),
        period=stride,
        original_length=original_max_position_embeddings,
    )


def _nearby(rows: tuple[int, int], begin: int, stride: int) -> list[Tile]:
    """Tiles of queries of the chunk that begins at ``begin`` with its keys and those before."""
    tiles = [Tile(0, rows, rows, TileShape.CAUSAL)]
    if begin < rows[0]:
        tiles.append(Tile(0, rows, (begin, rows[0]), TileShape.FULL))
    if begin:
        tiles.append(Tile(1, rows, (begin - stride, begin), TileShape.FULL))
    return tiles


def _chunk_tiles(first: int, end: int, stride: int) -> Iterator[Tile]:
    """Tiles in which far pairs are few large rectangles.

    Each tile gives a part of the gradient to all its queries and keys, so that a row of chunks at
    a time would write those of keys n / 2 times; halving writes log2(n) / 2. And the queries of
    several chunks read the keys of one head together, while a GPU has them at hand.
    """

    def far(begin: int, stop: int, keys: int, keys_end: int) -> Iterator[Tile]:
        """Queries of chunks ``[begin, stop)`` with keys of chunks ``[keys, keys_end)``."""
        if keys < keys_end:
            rows = max(first, begin * stride), min(end, stop * stride)
            yield Tile(2, rows, (keys * stride, keys_end * stride), TileShape.FULL)

    def halve(begin: int, stop: int) -> Iterator[Tile]:
        """Queries of chunks ``[begin, stop)``; far keys from chunk ``begin - 1`` on."""
        if stop - begin == 1:
            rows = max(first, begin * stride), min(end, stop * stride)
            yield from _nearby(rows, begin * stride, stride)
            return
        middle = (begin + stop) // 2
        yield from far(middle, stop, max(begin - 1, 0), middle - 1)
        yield from halve(begin, middle)
        yield from halve(middle, stop)

    begin, stop = first // stride, -(-end // stride)
    yield from far(begin, stop, 0, begin - 1)
    yield from halve(begin, stop)


@lru_cache(maxsize=64)
def string(shift: int, local_size: int) -> Bands:
    """Return STRING's bands: distances d below S as they are, the others d - S + W.

    Args:
        shift: S in tokens; the paper takes a third of the trained window.
        local_size: W in tokens; the paper takes 128.

    Raises:
        UserError: a size is out of range.
    """
    if not 0 < local_size <= shift:
        raise UserError(
            f"local_size is {local_size}, shift {shift}: local_size must be from 1 to shift"
        )
    return Bands(
        (_itself, lambda place: place - shift + local_size),
        (_itself, _itself),
        lambda query, key: (query - key >= shift).long(),
        lambda first, end: _near_and_far(first, end, shift),
    )


@lru_cache(maxsize=64)
def self_extend(group_size: int, window: int) -> Bands:
    """Return SelfExtend's bands: distances to w as they are, beyond it those of groups.

    A far pair stands at floor(i / G) - floor(j / G) + w - floor(w / G).

    Args:
        group_size: G in tokens.
        window: w in tokens, the distances that stay as they are.

    Raises:
        UserError: a size is out of range.
    """
    if group_size < 1 or window < 1:
        raise UserError(
            f"group_size is {group_size}, window {window}: both must be at least 1 token"
        )
    return Bands(
        (_itself, lambda place: place // group_size + window - window // group_size),
        (_itself, lambda place: place // group_size),
        lambda query, key: (query - key > window).long(),
        lambda first, end: _near_and_far(first, end, window + 1),
    )


def _itself(place: Tensor) -> Tensor:
    return place


def _near_and_far(start: int, length: int, near: int) -> Iterator[Tile]:
    """Tiles of distances below ``near`` (band 0) and of the others (band 1), of whole documents."""
    # Context parallelism alone asks for a part of a document's queries. --string and --self-extend
    # are refused with it before a model is opened, so that a caller in this package is wrong here.
    if start:
        raise ValueError(f"queries begin at place {start} of a document: these bands need them all")
    if length > near:
        yield Tile(1, (near, length), (0, length - near), TileShape.CAUSAL)
    for first in range(0, length, near):
        end = min(first + near, length)
        yield Tile(0, (first, end), (first, end), TileShape.CAUSAL)
        if first:
            yield from _nearest_before(first, end, near)


def _nearest_before(first: int, end: int, near: int) -> Iterator[Tile]:
    """Tiles of queries ``[first, end)`` with the keys before ``first`` that are near.

    Query ``first + r`` sees keys from ``first + r - near + 1``: a square that loses a column with
    every row, and where the queries are fewer than its columns, what is right of the square.
    """
    rows = min(end - first, near - 1)
    corner = first - near + 1
    if rows:
        yield Tile(0, (first, first + rows), (corner, corner + rows), TileShape.ANTICAUSAL)
    if corner + rows < first:
        yield Tile(0, (first, first + rows), (corner + rows, first), TileShape.FULL)
