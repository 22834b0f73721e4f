# SPDX-License-Identifier: Apache-2.0
"""Several documents per sample, each at a layout of its own and attending only to itself.

A document of n tokens is trained as a sample of n tokens that reaches T: short documents learn long
distances, too. Documents of N tokens or more have a sample to themselves, at the spans that the
strategy chooses among their first T, next T and so on.

Which documents share a sample: best fit, longest first, over the histogram of lengths instead of
the documents: a million documents have at most N lengths, and documents of one length are as good
as each other (the histogram idea is that of arXiv:2107.02027). No document is cut to fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from megatron_cream.data.dataset import SpanDataset
from megatron_cream.data.indexed import blocks
from megatron_cream.data.text_sources import PACK_MULTIPLE, TextSources
from megatron_cream.errors import UserError
from megatron_cream.positions import SampleLayout, Strategy


def trained_length(length: Any, strategy: Strategy) -> Any:
    """Return the tokens that a packed sample takes of a source of ``length``, or of many."""
    return np.minimum(length, strategy.train_length) // PACK_MULTIPLE * PACK_MULTIPLE


@dataclass(frozen=True)
class Bins:
    """Documents by bin: those of bin i are ``members[offsets[i] : offsets[i + 1]]``.

    Attributes:
        offsets: int64 ``[bins + 1]``.
        members: int32 ``[documents]``, every document once.
    """

    offsets: np.ndarray = field(repr=False)
    members: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.members[self.offsets[i] : self.offsets[i + 1]]


def pack_sources(sources: TextSources, strategy: Strategy) -> Bins:
    """Put sources into samples of N tokens; of many they are kept, as the list of sources is."""

    @cache
    def packed() -> Bins:
        return pack(trained_length(sources.lengths, strategy), strategy.train_length)

    kept, size = sources.cache, strategy.train_length
    if kept is None:
        return packed()
    return Bins(
        kept.array("bin-offsets", lambda: [packed().offsets], capacity=size),
        kept.array("bin-members", lambda: [packed().members], capacity=size),
    )


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Put documents of ``lengths`` tokens, ``[documents]``, into bins of ``capacity`` tokens.

    Raises:
        UserError: a length is less than 1 or more than the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int32)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise UserError(
            f"lengths are {lengths.min()} to {lengths.max()}: they must be from 1 to {capacity}"
        )
    counts = np.zeros(capacity + 1, dtype=np.int64)
    for part in blocks(lengths):
        counts += np.bincount(part, minlength=capacity + 1)
    values = np.flatnonzero(counts)
    counts = counts[values]
    plan = _plan(list(zip(values.tolist(), counts.tolist(), strict=True)), capacity)
    return _assign(plan, lengths, values, counts)


def _plan(histogram: list[tuple[int, int]], capacity: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (number of bins, lengths in each) groups; ``histogram`` is (length, count), rising."""
    plan: list[tuple[int, tuple[int, ...]]] = []
    groups: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # by room left
    rooms: list[int] = []  # its keys, sorted

    def put(count: int, content: tuple[int, ...], room: int) -> None:
        if not count:
            return
        if room == 0:
            plan.append((count, content))
        elif room in groups:
            groups[room].append((count, content))
        else:
            groups[room] = [(count, content)]
            insort(rooms, room)

    for length, left in reversed(histogram):
        while left:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            bins, content = groups[room].pop() if at < len(rooms) else (left, ())
            if at < len(rooms) and not groups[room]:
                del groups[room], rooms[at]
            each = min(room // length, left)
            filled = min(bins, left // each)
            put(filled, content + (length,) * each, room - each * length)
            if content:  # bins that were there before; new ones are only as many as needed
                put(bins - filled, content, room)
            left -= filled * each
    return plan + [group for room in rooms for group in groups[room]]


def _assign(
    plan: list[tuple[int, tuple[int, ...]]],
    lengths: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
) -> Bins:
    """Give every place of the plan a document of its length."""
    if values.max(initial=0) < 1 << 16:
        lengths = lengths.astype(np.uint16)  # which numpy sorts by digits
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    at = dict(zip(values.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
    members, sizes = [], []
    for bins, content in plan:
        columns = []
        for length, each in Counter(content).items():
            begin, at[length] = at[length], at[length] + bins * each
            columns.append(order[begin : at[length]].reshape(bins, each))
        members.append(np.concatenate(columns, axis=1).reshape(-1))
        sizes.append(np.full(bins, len(content)))
    if not plan:
        return Bins(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Bins(offsets, np.concatenate(members))


_MEMBERS = 1 << 20  # of one sample, at most; keeps the layouts of two samples apart


class PackedSpanDataset(SpanDataset):
    """Samples of N tokens made of whole short documents, for thd attention.

    A sample is a dict as SpanDataset's, and ``cu_seqlens``, int32 ``[documents + 1]``: where each
    document ends. The rest of a sample that no document fills is padding without loss, a document
    of its own.
    """

    @cached_property
    def bins(self) -> Bins:
        """Sources by sample."""
        return pack_sources(self.sources, self.strategy)

    @property
    def epoch_size(self) -> int:
        return len(self.bins)

    def sample(self, idx: int, draw: int) -> dict[str, torch.Tensor]:
        parts = [self.reader.read(source, layout) for source, layout in self._members(idx, draw)]
        padding = self._padding(sum(len(part["tokens"]) for part in parts))
        joined = {
            name: torch.from_numpy(np.concatenate([part[name] for part in [*parts, padding]]))
            for name in padding
        }
        return {**joined, **_boundaries([len(part["tokens"]) for part in [*parts, padding]])}

    def positions(self, idx: int, draw: int | None = None) -> dict[str, torch.Tensor]:
        """Return position ids and boundaries of sample ``idx`` without reading a token."""
        members = self._members(idx, idx if draw is None else draw)
        ids = [layout.position_ids for _, layout in members]
        ids.append(self._padding(sum(map(len, ids)))["position_ids"])
        return {
            "position_ids": torch.from_numpy(np.concatenate(ids)),
            **_boundaries([len(part) for part in ids]),
        }

    def _members(self, idx: int, draw: int) -> Iterator[tuple[int, SampleLayout]]:
        seed = self.position_seed
        for i, source in enumerate(self.bins[self.chosen(idx)].tolist()):
            length = int(trained_length(self.sources.stretch(source)[1], self.strategy))
            strategy = _for_length(self.strategy, length)
            yield source, strategy.layout(seed, int(draw) * _MEMBERS + i)

    def _padding(self, filled: int) -> dict[str, np.ndarray]:
        count = self.strategy.train_length - filled
        nothing = np.zeros(count, dtype=np.int64)
        return {
            "tokens": nothing,
            "labels": nothing,
            "loss_mask": np.zeros(count, dtype=np.float32),
            "position_ids": np.arange(count, dtype=np.int64),
        }


@lru_cache(maxsize=8192)
def _for_length(strategy: Strategy, length: int) -> Strategy:
    """Kept, because a strategy makes tables of its own at its first draw."""
    return strategy.for_length(length)


def _boundaries(lengths: list[int]) -> dict[str, torch.Tensor]:
    ends = np.cumsum([0, *(length for length in lengths if length)])
    return {"cu_seqlens": torch.from_numpy(ends.astype(np.int32))}
