# SPDX-License-Identifier: Apache-2.0
"""Statistics of a dataset: histogram, shares and median of its lengths, and `PREFIX.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cream.corpus.storage import LISTED_ERRORS
from megatron_cream.data.indexed import blocks


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


FORMAT_VERSION = 1
DUPLICATES = "duplicates"
FINGERPRINT = "fingerprint"


@dataclass
class Counts:
    """What did not get into a dataset.

    Attributes:
        dropped: documents by reason.
        errors: bad records by kind.
        listed: file and line, and what is wrong with it, of the first bad records.
        longest: tokens of the longest document, before eod and bos, kept or not.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    listed: list[list[str]] = field(default_factory=list)
    longest: int = 0

    def add(self, dropped: dict[str, int], errors: dict[str, int]) -> None:
        """Add the counts of a part or shard."""
        for total, more in ((self.dropped, dropped), (self.errors, errors)):
            for name, count in more.items():
                total[name] = total.get(name, 0) + count

    def list_errors(self, listed: list[list[str]]) -> None:
        """Add named bad records as long as there is room."""
        self.listed += listed[: LISTED_ERRORS - len(self.listed)]


def make_metadata(
    settings: dict[str, Any], lengths: Lengths, documents: int, median: float, counts: Counts
) -> dict[str, Any]:
    """Return the content of ``PREFIX.json``.

    Args:
        settings: of tokenizer and limits, as they stand in the file.
        lengths: of the sequences as written.
        documents: how many documents these are.
        median: tokens of the median sequence.
        counts: what is not there.
    """
    return {
        "format_version": FORMAT_VERSION,
        **settings,
        "documents": documents,
        "sequences": lengths.documents,
        "tokens": lengths.tokens,
        "dropped": counts.dropped,
        "errors": counts.errors,
        "listed_errors": counts.listed,
        "longest_document": lengths.longest,
        "mean_document": lengths.tokens / max(lengths.documents, 1),
        "median_document": median,
        "documents_by_length": lengths.histogram(),
        "share_at_least": lengths.shares(),
    }
