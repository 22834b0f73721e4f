# SPDX-License-Identifier: Apache-2.0
"""Lists the stretches of text that samples are drawn from.

What a sample is drawn from is a source, a stretch of consecutive tokens of the ``.bin`` file.
``document``: each document. ``window``: documents cut every T tokens, so that a book gives many
samples instead of its first T tokens. ``packed``: all documents in a row, cut every T tokens, so
that short ones are used too; documents are then apart only by their end-of-document token.
``packed-documents``: documents as with ``window``, short ones too, several per sample, apart.

The list of a large dataset is made once and kept in a file, which every rank and worker maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from megatron_cream.data.indexed import DatasetIndex, open_index, read_index
from megatron_cream.data.mapped import ArrayCache
from megatron_cream.errors import UserError
from megatron_cream.positions import Strategy

PACK_MULTIPLE = 16
"""Packed documents are cut to multiples of this many tokens, whatever the layout of the run:
context parallelism deals each of them out in 2 x CP equal parts, and samples must not depend on it.
"""

FEW = 1 << 20
"""Documents and sources whose list, and samples whose order, are made anew by each rank: that takes
0.1 seconds at most."""

_BLOCK = 1 << 20  # documents and sources that are looked at together
_FORMAT = 1  # of the files that are kept


@dataclass(frozen=True)
class TextSources:
    """Stretches of enough tokens for a sample, each of which one sample treats as its document.

    Attributes:
        rows: ``[n]`` of ``start``, int64, the first token, counted from the start of the ``.bin``
            file; ``length``, int32 where that holds T, tokens; and, where texts were cut,
            ``followed``, whether the text goes on behind the stretch.
        cache: where ``rows`` are kept, for what is made of them; None where they are few.
    """

    rows: np.ndarray = field(repr=False)
    cache: ArrayCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def stretch(self, source: int) -> tuple[int, int, int]:
        """Return ``starts``, ``lengths`` and ``ends`` of one source."""
        start, length, *followed = self.rows.item(source)
        return start, length, start + length + sum(followed)

    @property
    def starts(self) -> np.ndarray:
        """``[n]``, the first token of each, counted from the start of the ``.bin`` file."""
        return self.rows["start"]

    @property
    def lengths(self) -> np.ndarray:
        """``[n]`` tokens."""
        return self.rows["length"]

    @property
    def ends(self) -> np.ndarray:
        """``[n]``: a token of the stretch before this place has a true next token."""
        followed = self.rows["followed"] if "followed" in (self.rows.dtype.names or ()) else 0
        return self.starts + self.lengths + followed


def fewest_tokens(unit: str, strategy: Strategy) -> int:
    """Return how many tokens a text must have to be sampled from."""
    if unit != "packed-documents":
        return strategy.train_length
    return -(-strategy.shortest_length // PACK_MULTIPLE) * PACK_MULTIPLE


def open_sources(
    prefix: str, documents: range, unit: str, strategy: Strategy, folder: str | None
) -> TextSources:
    """Return the sources of consecutive documents of a dataset.

    Of a large dataset they are kept in a file, whose name is a hash of the sizes and times of
    change of the dataset's files and of all arguments; where it is there already, the index of the
    dataset was checked when it was made.

    Args:
        prefix: path of the dataset without suffix.
        documents: their numbers.
        unit: ``document``, ``window``, ``packed`` or ``packed-documents``.
        strategy: says how many tokens a sample takes, and from how many it chooses.
        folder: of the files that are kept; None for one beside the dataset, as Megatron has it.

    Raises:
        UserError: the dataset is damaged, or the folder cannot be written to.
    """
    index = open_index(prefix)
    if len(documents) + index.tokens // strategy.content_length <= FEW:
        return make_sources(unit, read_index(prefix), documents, strategy)
    files = [os.stat(prefix + suffix) for suffix in (".idx", ".bin")]
    signature = tuple((file.st_size, file.st_mtime_ns) for file in files)
    key = {
        "format": _FORMAT,
        "dataset": prefix,
        "files": signature,
        "documents": [documents.start, documents.stop],
        "unit": unit,
        "content_length": strategy.content_length,
        "fewest_tokens": fewest_tokens(unit, strategy),
    }
    cache = ArrayCache(folder or os.path.join(prefix, "cache", "SpanDataset_indices"), key)

    def build() -> Iterator[np.ndarray]:
        return _rows(unit, _read_index_once(prefix, signature), documents, strategy)

    return TextSources(cache.array("sources", build), cache)


@lru_cache(maxsize=64)
def _read_index_once(prefix: str, signature: object) -> DatasetIndex:
    """Check a large index once for all splits."""
    return read_index(prefix)


def make_sources(
    unit: str, index: DatasetIndex, documents: range, strategy: Strategy
) -> TextSources:
    """Return the sources of consecutive documents, in memory; see ``open_sources``."""
    return TextSources(np.concatenate(list(_rows(unit, index, documents, strategy))))


def _rows(
    unit: str, index: DatasetIndex, documents: range, strategy: Strategy
) -> Iterator[np.ndarray]:
    """Yield the rows of ``TextSources`` a block at a time, one at least."""
    size, fewest = strategy.content_length, fewest_tokens(unit, strategy)
    chosen = slice(documents.start, documents.stop)
    starts, lengths = index.pointers[chosen], index.lengths[chosen]
    if unit == "packed" and len(lengths):  # they follow each other: read_index says so
        starts, lengths = starts[:1], lengths.sum(dtype=np.int64, keepdims=True)
    cut = unit != "document" and bool(lengths.max(initial=0) > size)
    number = "<i4" if max(size, lengths.max(initial=0) * (not cut)) < 1 << 31 else "<i8"
    kinds = [("start", "<i8"), ("length", number), ("followed", "?")]
    dtype = np.dtype(kinds if cut else kinds[:2])
    yield np.empty(0, dtype)
    for at in range(0, len(lengths), _BLOCK):
        first = starts[at : at + _BLOCK] // index.dtype.itemsize
        count = lengths[at : at + _BLOCK].astype(np.int64)
        pieces = _cut(first, count, size) if cut else [(first, count)]
        for columns in pieces:
            keep = columns[1] >= fewest
            rows = np.empty(int(keep.sum()), dtype)
            for name, column in zip(dtype.names or (), columns, strict=True):
                rows[name] = column[keep]
            yield rows


def _cut(starts: np.ndarray, lengths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Cut texts every ``size`` tokens; the last piece of each has what is left.

    Yields:
        Starts, lengths, and whether the text goes on, of so many pieces as fit into memory.
    """
    last = np.cumsum(-(-lengths // size))  # number of the piece behind each text
    ends = starts + lengths
    for at in range(0, int(last[-1]), _BLOCK):
        stop = min(at + _BLOCK, int(last[-1]))
        texts = np.arange(*np.searchsorted(last, (at, stop - 1), side="right") + (0, 1))
        each = np.diff(np.minimum(last[texts], stop), prepend=at)
        owner = np.repeat(texts, each)
        # Counted from the end, because there alone a piece may be shorter.
        left = last[owner] - np.arange(at, stop)
        piece = starts[owner] + (-(-lengths[owner] // size) - left) * size
        yield piece, np.minimum(size, ends[owner] - piece), left > 1


def validate_sources(
    sources: TextSources,
    lengths: np.ndarray,
    path: str | None,
    split: str,
    unit: str,
    strategy: Strategy,
) -> None:
    """Refuse a split of a dataset that has no sample; ``lengths`` are those of its documents.

    Raises:
        UserError: naming the dataset, the tokens that a sample takes, and those there are.
    """
    if len(sources):
        return
    fewest = fewest_tokens(unit, strategy)
    short = fewest < strategy.train_length
    why = "what the strategy can place in --target-length" if short else "--seq-length"
    if unit == "packed":
        lengths = lengths.sum(dtype=np.int64, keepdims=True)
    raise UserError(
        f"dataset {path} has no document for the {split} split: a sample takes at least "
        f"{fewest} tokens of one ({why}), and the longest of its {len(lengths)} has "
        f"{lengths.max(initial=0)}; give longer documents, a shorter --seq-length, another "
        "--split, or --sample-unit packed"
    )
