# SPDX-License-Identifier: Apache-2.0
"""Joins parts, or whole datasets, to one: tokens are copied by the kernel, the index is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cream.corpus.statistics import Lengths
from megatron_cream.corpus.storage import EncodedPart
from megatron_cream.data.indexed import write_index
from megatron_cream.errors import UserError

_BUCKET_BYTES = 256 << 20
_COPY_BYTES = 64 << 20

SequenceLayout = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Segment:
    """A stretch of the dataset to be.

    Attributes:
        bin: the file of its tokens.
        documents: how many it has.
        layout: returns int64 ``[sequences]``, tokens in each, and int64 ``[documents]``, how many
            sequences each document has.
        hashes: returns a hash of each document; None where duplicates are kept.
    """

    bin: str
    documents: int
    layout: Callable[[], SequenceLayout]
    hashes: Callable[[], np.ndarray] | None = None


def part_segment(part: EncodedPart, max_tokens: int | None, head: int, tail: int) -> Segment:
    """Return a part as a segment, its documents split every ``max_tokens`` (see ``split``)."""
    return Segment(
        part.bin,
        part.note.documents,
        lambda: split(part.lengths(), max_tokens, head, tail),
        part.hashes if part.note.hashed else None,
    )


def split(lengths: np.ndarray, max_tokens: int | None, head: int, tail: int) -> SequenceLayout:
    """Return the sequences of documents that are split every ``max_tokens`` tokens.

    The tokens stay as they are: bos, which is not counted, is in the first sequence of a document
    and eod in the last.

    Args:
        lengths: int64 ``[documents]``, bos and eod included.
        max_tokens: None for one sequence per document.
        head, tail: 1 where there is a bos or an eod, else 0.
    """
    if max_tokens is None:
        return lengths, np.ones(len(lengths), dtype=np.int64)
    content = lengths - head - tail
    counts = np.maximum(-(-content // max_tokens), 1)
    sequences = np.full(int(counts.sum()), max_tokens, dtype=np.int64)
    last = np.cumsum(counts) - 1
    sequences[last] = content - (counts - 1) * max_tokens + tail
    sequences[last - counts + 1] += head
    return sequences, counts


def first_copies(segments: Sequence[Segment]) -> np.ndarray:
    """Return bool ``[documents]`` of all segments: whether no earlier document is the same.

    Hashes are looked at in as many passes as it takes to have few in memory.
    """
    total = sum(segment.documents for segment in segments)
    first = np.ones(total, dtype=bool)
    buckets = -(-total * 32 // _BUCKET_BYTES)
    for bucket in range(buckets):
        found, where, before = [], [], 0
        for segment in segments:
            pairs = segment.hashes().view("<u8").reshape(-1, 2)
            inside = np.flatnonzero(pairs[:, 0] % np.uint64(buckets) == bucket)
            found.append(pairs[inside])
            where.append(inside + before)
            before += segment.documents
        hashes, places = np.concatenate(found), np.concatenate(where)
        order = np.lexsort((places, hashes[:, 1], hashes[:, 0]))
        same = (hashes[order][1:] == hashes[order][:-1]).all(axis=1)
        first[places[order][1:][same]] = False
    return first


def assemble(
    staged: str,
    dtype: np.dtype,
    segments: Sequence[Segment],
    kept: np.ndarray | None,
    thresholds: tuple[int, ...] = (),
) -> tuple[Lengths, int]:
    """Write ``staged.bin`` and ``staged.idx``.

    Args:
        staged: path without suffix.
        dtype: of the tokens in every segment.
        segments: in order.
        kept: bool ``[documents]`` of all segments; None for every document.
        thresholds: lengths to count the sequences of.

    Returns:
        The lengths of the sequences, and the number of documents.
    """
    counted, documents = Lengths(thresholds), 0
    with open(staged + ".bin", "wb") as out:
        for segment, keep in _with_kept(segments, kept):
            lengths, counts = segment.layout()
            _copy_documents(segment.bin, out.fileno(), lengths, counts, keep, dtype.itemsize)
            lengths, counts = _kept_layout(lengths, counts, keep)
            counted.add(lengths)
            documents += len(counts)
    blocks = (_kept_layout(*segment.layout(), keep) for segment, keep in _with_kept(segments, kept))
    write_index(staged + ".idx", dtype, blocks, counted.documents, documents)
    return counted, documents


def write_hashes(path: str, segments: Sequence[Segment], kept: np.ndarray) -> None:
    """Write the hashes of the documents that are kept."""
    with open(path, "wb") as out:
        for segment, keep in _with_kept(segments, kept):
            out.write(segment.hashes()[keep].tobytes())


def _with_kept(
    segments: Sequence[Segment], kept: np.ndarray | None
) -> Iterator[tuple[Segment, np.ndarray | None]]:
    before = 0
    for segment in segments:
        end = before + segment.documents
        keep = None if kept is None else kept[before:end]
        yield segment, None if keep is None or keep.all() else keep
        before = end


def _kept_layout(
    lengths: np.ndarray, counts: np.ndarray, keep: np.ndarray | None
) -> SequenceLayout:
    return (lengths, counts) if keep is None else (lengths[np.repeat(keep, counts)], counts[keep])


def _copy_documents(
    path: str,
    out: int,
    lengths: np.ndarray,
    counts: np.ndarray,
    keep: np.ndarray | None,
    itemsize: int,
) -> None:
    """Copy the bytes of the documents that are kept, neighbours in one go."""
    bytes_before = np.concatenate(([0], np.cumsum(lengths))) * itemsize
    borders = bytes_before[np.concatenate(([0], np.cumsum(counts)))]
    if keep is None:
        edges = np.array([0, len(counts)])
    else:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], keep.astype(np.int8), [0]))))
    stretches = borders[edges].reshape(-1, 2).tolist()
    with open(path, "rb") as source:
        for start, end in stretches:
            _copy(source.fileno(), out, start, end - start, path)


def _copy(source: int, out: int, offset: int, left: int, path: str) -> None:
    while left:
        try:
            done = os.copy_file_range(source, out, min(left, _COPY_BYTES), offset)
        except OSError:
            # Not every file system can; a full one says so again here.
            done = os.sendfile(out, source, offset, min(left, _COPY_BYTES))
        if not done:
            raise UserError(f"{path}: ends {left} bytes early")
        offset += done
        left -= done
