# SPDX-License-Identifier: Apache-2.0
"""``PREFIX.json``: how a dataset was made and what is in it, the same for every way to make it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_cream.corpus.statistics import Lengths
from megatron_cream.corpus.storage import LISTED_ERRORS

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


def make_note(
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
