# SPDX-License-Identifier: Apache-2.0
"""Which stretches of text samples are drawn from.

A source is a stretch of consecutive tokens in the ``.bin`` file that one sample treats as its
document. ``document``: each document. ``window``: documents cut every T tokens, so that a book
gives many samples instead of its first T tokens. ``packed``: all documents in a row, cut every T
tokens, so that short ones are used too; documents are then apart only by their end-of-document
token. ``packed-documents``: documents as with ``window``, short ones too, several per sample,
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.positions import SampleLayout, Span, Strategy, philox

PACK_MULTIPLE = 16
"""Packed documents are cut to multiples of this many tokens, whatever the layout of the run:
context parallelism deals each of them out in 2 x CP equal parts, and samples must not depend on it.
"""


@dataclass(frozen=True)
class Sources:
    """Stretches of enough tokens for a sample.

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
) -> Sources:
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
    return Sources(starts[keep], lengths[keep], ends[keep], int((~keep).sum()), longest)


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


_SOURCES = 256
_EPOCHS = 32
_STREAM = 5  # keeps what is counted apart from what a run draws


@dataclass(frozen=True)
class Repetition:
    """What a run reads of a dataset.

    Attributes:
        share: of the tokens of all sources, those that are read at all.
        most: how many times the most repeated ones are read.
    """

    share: float
    most: int


def repetition(
    sources: Sources, epochs: float, layout_of: Callable[[int, int], SampleLayout]
) -> Repetition:
    """Return how often tokens are read by a run of so many epochs.

    Args:
        sources: what an epoch reads, each once.
        epochs: any real number above 0.
        layout_of: source and draw to a layout.
    """
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(_SOURCES, len(sources))).astype(int))
    draws = philox.generator(0, 0, _STREAM).permutation(len(chosen))
    counted = min(epochs, _EPOCHS)
    read = most = 0
    for rank, source in zip(draws.tolist(), chosen.tolist(), strict=True):
        # Of a part of an epoch, every source has its part of the chance, as evenly as can be.
        times = int(counted + (rank + 0.5) / len(chosen))
        length = sources.lengths.item(source)
        layouts = (layout_of(source, _EPOCHS * rank + epoch) for epoch in range(times))
        union, deepest = _overlap([span for layout in layouts for span in layout.spans(length)])
        read, most = read + union, max(most, deepest)
    share = read / int(sources.lengths[chosen].sum())
    return Repetition(share, round(most * epochs / counted))


def _overlap(spans: list[Span]) -> tuple[int, int]:
    """Return the tokens that any span holds, and how many spans hold the same one at most."""
    if not spans:
        return 0, 0
    offsets, lengths = np.array(spans, dtype=np.int64).T
    at = np.concatenate([offsets, offsets + lengths])
    steps = np.repeat([1, -1], len(spans))
    order = np.lexsort((steps, at))  # at one place, ends before beginnings
    depth = np.cumsum(steps[order])
    covered = np.diff(at[order])[depth[:-1] > 0].sum()
    return int(covered), int(depth.max())
