# SPDX-License-Identifier: Apache-2.0
"""Which stretches of text samples are drawn from.

A source is a stretch of consecutive tokens in the ``.bin`` file that one sample treats as its
document. ``document``: each document. ``window``: documents cut every T tokens, so that a book
gives many samples instead of its first T tokens. ``packed``: all documents in a row, cut every T
tokens, so that short ones are used too; documents are then apart only by their end-of-document
token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sources:
    """Stretches of at least N tokens.

    Attributes:
        starts: int64 ``[n]``, first token, counted from the start of the ``.bin`` file.
        lengths: int64 ``[n]``, tokens.
        ends: int64 ``[n]``, where the text that follows a stretch ends; a token before it has a
            true next token.
        dropped: documents (or, packed, tokens at the end of the stream) too short for a sample.
        longest: tokens in the longest stretch before dropping.
    """

    starts: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    ends: np.ndarray = field(repr=False)
    dropped: int
    longest: int

    def __len__(self) -> int:
        return len(self.starts)


def make_sources(
    unit: str,
    document_starts: np.ndarray,
    document_lengths: np.ndarray,
    train_length: int,
    content_length: int,
) -> Sources:
    """Cut documents into sources.

    Args:
        unit: ``document``, ``window`` or ``packed``.
        document_starts: int64 ``[documents]``, first token of each in the ``.bin`` file.
        document_lengths: ``[documents]`` tokens.
        train_length: N, the fewest tokens a source may have.
        content_length: tokens a sample chooses from: T, or N for strategies that read one span.

    Raises:
        ValueError: ``packed`` documents do not follow each other in the file.
    """
    starts = np.asarray(document_starts, dtype=np.int64)
    lengths = np.asarray(document_lengths, dtype=np.int64)
    if unit == "packed":
        starts, lengths = _one_stream(starts, lengths)
    ends = starts + lengths
    longest = int(lengths.max(initial=0))
    if unit != "document":
        starts, lengths, ends = _cut(starts, lengths, ends, content_length)
    keep = lengths >= train_length
    return Sources(starts[keep], lengths[keep], ends[keep], int((~keep).sum()), longest)


def _one_stream(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(starts) > 1 and not np.array_equal(starts[:-1] + lengths[:-1], starts[1:]):
        raise ValueError(
            "sample_unit (--sample-unit) is 'packed': the documents of this dataset do not follow "
            "each other in its .bin file; use 'window' or write it with tools/preprocess_data.py"
        )
    return starts[:1], np.array([lengths.sum()], dtype=np.int64)


def _cut(
    starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each stretch every ``size`` tokens; the last piece keeps what is left."""
    pieces = -(-lengths // size)
    owner = np.repeat(np.arange(len(starts)), pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_starts = starts[owner] + nth * size
    return piece_starts, np.minimum(size, ends[owner] - piece_starts), ends[owner]
