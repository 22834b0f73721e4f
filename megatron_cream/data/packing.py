# SPDX-License-Identifier: Apache-2.0
"""Which documents share a sample of N tokens.

Best fit, longest first, over the histogram of lengths instead of the documents: a million
documents have at most N lengths, and documents of one length are as good as each other (the
histogram idea is that of arXiv:2107.02027). No document is cut to fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError


@dataclass(frozen=True)
class Bins:
    """Documents by bin: those of bin i are ``members[offsets[i] : offsets[i + 1]]``.

    Attributes:
        offsets: int64 ``[bins + 1]``.
        members: int64 ``[documents]``, every document once.
    """

    offsets: np.ndarray = field(repr=False)
    members: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.members[self.offsets[i] : self.offsets[i + 1]]


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Put documents of ``lengths`` tokens, ``[documents]``, into bins of ``capacity`` tokens.

    Raises:
        UserError: a length is less than 1 or more than the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise UserError(
            f"lengths are {lengths.min()} to {lengths.max()}: they must be from 1 to {capacity}"
        )
    values, counts = np.unique(lengths, return_counts=True)
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
    order = np.argsort(lengths, kind="stable")
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
        return Bins(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Bins(offsets, np.concatenate(members))
