# SPDX-License-Identifier: Apache-2.0
"""Lists the stretches of text that samples are drawn from.

What a sample is drawn from is a source, a stretch of consecutive tokens of the ``.bin`` file.
``document``: each document. ``window``: documents cut every T tokens, so that a book gives many
samples instead of its first T tokens. ``packed``: all documents in a row, cut every T tokens, so
that short ones are used too; documents are then apart only by their end-of-document token.
``packed-documents``: documents as with ``window``, short ones too, several per sample, apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.positions import Strategy

PACK_MULTIPLE = 16
"""Packed documents are cut to multiples of this many tokens, whatever the layout of the run:
context parallelism deals each of them out in 2 x CP equal parts, and samples must not depend on it.
"""


@dataclass(frozen=True)
class TextSources:
    """Stretches of enough tokens for a sample, each of which one sample treats as its document.

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


def fewest_tokens(unit: str, strategy: Strategy) -> int:
    """Return how many tokens a text must have to be sampled from."""
    if unit != "packed-documents":
        return strategy.train_length
    return -(-strategy.shortest_length // PACK_MULTIPLE) * PACK_MULTIPLE


def make_sources(
    unit: str,
    document_starts: np.ndarray,
    document_lengths: np.ndarray,
    strategy: Strategy,
) -> TextSources:
    """Cut documents into sources.

    Args:
        unit: ``document``, ``window``, ``packed`` or ``packed-documents``.
        document_starts: int64 ``[documents]``, first token of each in the ``.bin`` file.
        document_lengths: ``[documents]`` tokens.
        strategy: says how many tokens a sample takes, and from how many it chooses.

    Raises:
        UserError: ``packed`` documents do not follow each other in the file.
    """
    starts = np.asarray(document_starts, dtype=np.int64)
    lengths = np.asarray(document_lengths, dtype=np.int64)
    if unit == "packed":
        starts, lengths = _one_stream(starts, lengths)
    ends = starts + lengths
    longest = int(lengths.max(initial=0))
    if unit != "document":
        starts, lengths, ends = _cut(starts, lengths, ends, strategy.content_length)
    keep = lengths >= fewest_tokens(unit, strategy)
    return TextSources(starts[keep], lengths[keep], ends[keep], int((~keep).sum()), longest)


def _one_stream(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(starts) > 1 and not np.array_equal(starts[:-1] + lengths[:-1], starts[1:]):
        raise UserError(
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


def validate_sources(
    sources: TextSources, path: str | None, split: str, unit: str, strategy: Strategy
) -> None:
    """Refuse a split of a dataset that has no sample.

    Raises:
        UserError: naming the dataset, the tokens that a sample takes, and those there are.
    """
    if len(sources):
        return
    fewest = fewest_tokens(unit, strategy)
    short = fewest < strategy.train_length
    why = "what the strategy can place in --target-length" if short else "--seq-length"
    raise UserError(
        f"dataset {path} has no document for the {split} split: a sample takes at least "
        f"{fewest} tokens of one ({why}), and the longest of its {sources.dropped} has "
        f"{sources.longest}; give longer documents, a shorter --seq-length, another --split, or "
        "--sample-unit packed"
    )
