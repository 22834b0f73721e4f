# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset out of parts of a job, or of other datasets: all files of it.

Tokens are copied by the kernel; the index is written anew. Megatron's own writer keeps a Python
integer for every document, this one an array.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.inspection import count_lengths
from megatron_cream.data.indexed import (
    INDEX_HEADER,
    INDEX_MAGIC,
    MASK_SUFFIX,
    TOKEN_DTYPES,
    check_mask,
    read_index,
)
from megatron_cream.errors import UserError

FORMAT_VERSION = 1
DUPLICATES = "duplicates"
FINGERPRINT = "fingerprint"
LISTED_ERRORS = 1000
"""Bad records that are named one by one; all are counted."""

HASH_BYTES = 16
_BUCKET_BYTES = 256 << 20  # of memory, for hashes
_HASHED_BYTES = 64  # with what sorting them takes
_COPY_BYTES = 64 << 20
_LONGEST_SEQUENCE = np.iinfo(np.int32).max

SequenceLengths = tuple[np.ndarray, np.ndarray]
"""int64 ``[sequences]``, tokens in each, and int64 ``[documents]``, how many sequences each has."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the dataset to be: a part of a job, or a whole dataset.

    Attributes:
        bin: the file of its tokens.
        documents: how many it has.
        sequences: returns the lengths of its sequences.
        hashes: returns a hash of each document, where duplicates are dropped.
        mask: the file that says which tokens have a loss, one byte per token; None for all.
    """

    bin: str
    documents: int
    sequences: Callable[[], SequenceLengths]
    hashes: Callable[[], np.ndarray]
    mask: str | None = None


def split(lengths: np.ndarray, max_tokens: int | None, head: int, tail: int) -> SequenceLengths:
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


_HASHED = np.dtype([("first", "<u8"), ("second", "<u8"), ("place", "<i8")])


def first_copies(segments: Sequence[Segment], folder: str) -> np.ndarray:
    """Return bool ``[documents]`` of all segments: whether no earlier document is the same.

    Hashes are read once. Where they are too many for memory they are dealt out to files in
    ``folder`` by their first bits, and looked at a file at a time. That takes 24 bytes per document
    on the disk, which are free again at the end, and a byte per document in memory.
    """
    total = sum(segment.documents for segment in segments)
    first = np.ones(total, dtype=bool)
    parts = -(-total * _HASHED_BYTES // _BUCKET_BYTES)
    if parts < 2:
        _distinct(first, np.concatenate(list(_batches(segments))))
        return first
    borders = np.array([(part << 64) // parts for part in range(1, parts)], dtype=np.uint64)
    with tempfile.TemporaryDirectory(prefix="hashes-", dir=folder) as scratch:
        paths = [os.path.join(scratch, str(part)) for part in range(parts)]
        for batch in _batches(segments):
            rows = _distinct(first, batch)
            dealt = np.split(rows, np.searchsorted(rows["first"], borders))
            for path, part in zip(paths, dealt, strict=True):
                with open(path, "ab") as file:
                    file.write(part.data)
        for path in paths:
            _distinct(first, np.fromfile(path, _HASHED))
            os.unlink(path)
    return first


def _batches(segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Yield the hashes of all documents with their places, in order, so many as memory holds."""
    most = max(_BUCKET_BYTES // _HASHED_BYTES // 4, 1)
    waiting: list[np.ndarray] = [np.empty(0, f"V{HASH_BYTES}")]
    place = count = 0
    for segment in segments:
        hashes = segment.hashes()
        for at in range(0, len(hashes), most):
            waiting.append(hashes[at : at + most])
            count += len(waiting[-1])
            if count >= most:
                yield _hashed(waiting, place)
                place, count, waiting = place + count, 0, waiting[:1]
    yield _hashed(waiting, place)


def _hashed(hashes: Sequence[np.ndarray], place: int) -> np.ndarray:
    """Return hashes with the numbers of their documents, of which the first is ``place``."""
    pairs = np.concatenate(hashes).view("<u8").reshape(-1, 2)
    rows = np.empty(len(pairs), _HASHED)
    rows["first"], rows["second"] = pairs.T
    rows["place"] = np.arange(place, place + len(rows))
    return rows


def _distinct(first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows by hash without copies of earlier ones, which become False in ``first``."""
    rows = rows[np.argsort(rows["first"], kind="stable")]  # which keeps equal ones in order
    near, equal = (rows[half][1:] == rows[half][:-1] for half in ("first", "second"))
    if (near & ~equal).any():  # half a hash in common: by chance, so sorting whole ones is rare
        rows = rows[np.lexsort((rows["second"], rows["first"]))]
        near, equal = (rows[half][1:] == rows[half][:-1] for half in ("first", "second"))
    copies = np.concatenate(([False], near & equal))[: len(rows)]
    first[rows["place"][copies]] = False
    return rows[~copies]


def assemble(
    staged: str,
    dtype: np.dtype,
    segments: Sequence[Segment],
    kept: np.ndarray | None,
) -> int:
    """Write ``staged.bin`` and ``staged.idx``, and ``staged.mask`` if a segment has a mask.

    Args:
        staged: path without suffix.
        dtype: of the tokens in every segment.
        segments: in order.
        kept: bool ``[documents]`` of all segments; None for every document.

    Returns:
        The number of documents.
    """
    sequences = documents = 0
    with open(staged + ".bin", "wb") as out:
        for segment, keep in _with_kept(segments, kept):
            lengths, counts = segment.sequences()
            _copy_documents(segment.bin, out.fileno(), lengths, counts, keep, dtype.itemsize)
            lengths, counts = _kept_sequences(lengths, counts, keep)
            sequences += len(lengths)
            documents += len(counts)
    if any(segment.mask for segment in segments):
        _write_mask(staged + MASK_SUFFIX, _with_kept(segments, kept))
    every = _with_kept(segments, kept)
    blocks = (_kept_sequences(*segment.sequences(), keep) for segment, keep in every)
    write_index(staged + ".idx", dtype, blocks, sequences, documents)
    return documents


def _write_mask(path: str, segments: Iterable[tuple[Segment, np.ndarray | None]]) -> None:
    """Write the masks of the documents that are kept; a segment without one is all trained."""
    with open(path, "wb") as out:
        for segment, keep in segments:
            lengths, counts = segment.sequences()
            if segment.mask is not None:
                _copy_documents(segment.mask, out.fileno(), lengths, counts, keep, 1)
                continue
            left = int(_kept_sequences(lengths, counts, keep)[0].sum(dtype=np.int64))
            while left:
                left -= os.write(out.fileno(), b"\1" * min(left, _COPY_BYTES))


def write_hashes(path: str, segments: Sequence[Segment], kept: np.ndarray) -> None:
    """Write the hashes of the documents that are kept."""
    with open(path, "wb") as out:
        for segment, keep in _with_kept(segments, kept):
            out.write(segment.hashes()[slice(None) if keep is None else keep].tobytes())


def _with_kept(
    segments: Sequence[Segment], kept: np.ndarray | None
) -> Iterator[tuple[Segment, np.ndarray | None]]:
    """Yield each segment with its stretch of ``kept``, None where all its documents are."""
    before = 0
    for segment in segments:
        end = before + segment.documents
        keep = None if kept is None else kept[before:end]
        yield segment, None if keep is None or keep.all() else keep
        before = end


def _kept_sequences(
    lengths: np.ndarray, counts: np.ndarray, keep: np.ndarray | None
) -> SequenceLengths:
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
    with open(path, "rb") as file:
        for start, end in borders[edges].reshape(-1, 2).tolist():
            _copy(file.fileno(), out, start, end - start, path)


def _copy(file: int, out: int, offset: int, left: int, path: str) -> None:
    while left:
        try:
            done = os.copy_file_range(file, out, min(left, _COPY_BYTES), offset)
        except OSError:
            # Not every file system can; a full one says so again here.
            done = os.sendfile(out, file, offset, min(left, _COPY_BYTES))
        if not done:
            raise UserError(f"{path}: ends {left} bytes early")
        offset += done
        left -= done


def write_index(
    path: str | os.PathLike[str],
    dtype: np.dtype,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    sequences: int,
    documents: int,
) -> None:
    """Write an ``.idx`` file, the bytes of Megatron's own builder, a block at a time.

    Args:
        path: the file.
        dtype: of a token.
        blocks: of documents: int32 ``[sequences]``, tokens in each, and int64 ``[documents]``, how
            many sequences each document has.
        sequences, documents: in all blocks.

    Raises:
        UserError: a sequence is too long for the format.
    """
    code = next(code for code, known in TOKEN_DTYPES.items() if dtype == known)
    header = INDEX_HEADER.pack(INDEX_MAGIC, 1, code, sequences, documents + 1)
    at = [len(header), len(header) + 4 * sequences, len(header) + 12 * sequences]
    byte = sequence = 0
    with open(path, "wb") as file:
        file.write(header)
        file.seek(at[2])
        file.write(bytes(8))  # the first document begins at sequence 0
        at[2] += 8
        for lengths, counts in blocks:
            if lengths.max(initial=0) > _LONGEST_SEQUENCE:
                raise UserError(
                    f"--max-tokens: a document has {lengths.max()} tokens and an index can hold "
                    f"{_LONGEST_SEQUENCE}, needs a limit below that"
                )
            sizes = lengths.astype(np.int64) * dtype.itemsize
            pointers = byte + np.cumsum(sizes) - sizes
            ends = sequence + np.cumsum(counts, dtype=np.int64)
            byte += int(sizes.sum())
            sequence += len(lengths)
            columns = (lengths.astype("<i4"), pointers.astype("<i8"), ends.astype("<i8"))
            for i, column in enumerate(columns):
                file.seek(at[i])
                file.write(column.tobytes())
                at[i] += column.nbytes


@dataclass
class Counts:
    """What did not get into a dataset.

    Attributes:
        dropped: documents by reason.
        errors: bad records by kind.
        listed: file and line, and what is wrong with it, of the first bad records.
        longest: tokens of the longest document, before eod and bos, kept or not.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    listed: list[list[str]] = field(default_factory=list)
    longest: int = 0

    def add(self, dropped: dict[str, int], errors: dict[str, int]) -> None:
        """Add the counts of a part or shard."""
        self.dropped.update(dropped)
        self.errors.update(errors)

    def list_errors(self, listed: list[list[str]]) -> None:
        """Add named bad records as long as there is room."""
        self.listed += listed[: LISTED_ERRORS - len(self.listed)]


def write_metadata(
    prefix: str, settings: dict[str, Any], counts: Counts, thresholds: Sequence[int] = ()
) -> dict[str, Any]:
    """Write ``PREFIX.json`` beside the index of a new dataset; returns its content.

    Args:
        prefix: path of the dataset without suffix.
        settings: of tokenizer and limits, as they stand in the file.
        counts: what is not there.
        thresholds: lengths to count the sequences of.
    """
    index, mask = read_index(prefix, empty=True), prefix + MASK_SUFFIX
    masked: dict[str, int] = {}
    if os.path.isfile(mask):
        masked = {"mask_bytes": os.path.getsize(mask), "trained_tokens": check_mask(prefix)}
    content = {
        "format_version": FORMAT_VERSION,
        **settings,
        "documents": len(index.documents) - 1,
        **count_lengths(index.lengths, thresholds),
        "dropped": counts.dropped,
        "errors": counts.errors,
        "listed_errors": counts.listed,
        **masked,
    }
    Path(prefix + ".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


COUNTED_KEYS = frozenset(
    {"format_version", "documents", "dropped", "errors", "listed_errors"}
    | count_lengths(np.zeros(0, dtype=np.int32)).keys()
)
"""What every ``PREFIX.json`` has beside the settings."""
