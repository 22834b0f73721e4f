# SPDX-License-Identifier: Apache-2.0
"""Document lengths of a dataset: histogram, shares, median, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_BLOCK = 1 << 20


@dataclass
class Lengths:
    """Counts of document lengths, one block of them at a time.

    Attributes:
        documents, tokens, longest: of all documents.
        bins: how many documents have 2**i to 2**(i + 1) - 1 tokens, i from 0; none has 0 tokens.
        at_least: how many documents have at least so many tokens, for each asked for.
    """

    thresholds: tuple[int, ...] = ()
    documents: int = 0
    tokens: int = 0
    longest: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(63, dtype=np.int64))
    at_least: dict[int, int] = field(default_factory=dict)

    def add(self, lengths: np.ndarray) -> None:
        """Count int64 ``[documents]`` tokens."""
        if not len(lengths):
            return
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))
        # The exponent of frexp is that of the power of two above; exact up to 2**53.
        self.bins += np.bincount(np.frexp(lengths)[1] - 1, minlength=63)[:63]
        for threshold in self.thresholds:
            found = int((lengths >= threshold).sum())
            self.at_least[threshold] = self.at_least.get(threshold, 0) + found

    def histogram(self) -> dict[str, int]:
        """Documents by the fewest tokens of their bin, up to the last bin that has any."""
        last = np.flatnonzero(self.bins)
        stop = int(last[-1]) + 1 if len(last) else 0
        return {str(1 << i): int(self.bins[i]) for i in range(stop)}

    def shares(self) -> dict[str, float]:
        """The share of the documents of at least so many tokens, for each asked for."""
        return {
            str(threshold): self.at_least.get(threshold, 0) / max(self.documents, 1)
            for threshold in self.thresholds
        }


def median(lengths: np.ndarray) -> float:
    """Return the median of non-negative integers below 2**32 that may be a memory map.

    Counts by the upper half of the bits, then by the lower half of those that matter, so that no
    copy of all of them is made.
    """
    count = len(lengths)
    if not count:
        return 0.0
    return (_nth(lengths, (count - 1) // 2) + _nth(lengths, count // 2)) / 2


def draw_histogram(histogram: dict[str, int], width: int = 40) -> str:
    """Return a bar for each bin of ``Lengths.histogram``."""
    most = max(histogram.values(), default=0)
    lines = []
    for i, (fewest, count) in enumerate(histogram.items()):
        bar = "#" * -(-count * width // max(most, 1))
        lines.append(f"{fewest:>10} to {(2 << i) - 1:<10} {count:>10}  {bar}".rstrip())
    return "\n".join(lines)


def blocks(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a long array a block at a time, as int64."""
    for start in range(0, len(lengths), _BLOCK):
        yield lengths[start : start + _BLOCK].astype(np.int64)


def measure(lengths: np.ndarray, thresholds: Sequence[int] = ()) -> Lengths:
    """Count the lengths of an index."""
    counted = Lengths(tuple(thresholds))
    for block in blocks(lengths):
        counted.add(block)
    return counted


def _nth(lengths: np.ndarray, n: int) -> int:
    upper = sum(np.bincount(block >> 16, minlength=1 << 16) for block in blocks(lengths))
    high = int(np.searchsorted(np.cumsum(upper), n, side="right"))
    n -= int(upper[:high].sum())
    lower = sum(
        np.bincount(block[block >> 16 == high] & 0xFFFF, minlength=1 << 16)
        for block in blocks(lengths)
    )
    return (high << 16) + int(np.searchsorted(np.cumsum(lower), n, side="right"))
