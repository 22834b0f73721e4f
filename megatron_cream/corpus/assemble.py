# SPDX-License-Identifier: Apache-2.0
"""Builds a dataset out of the parts of a job, or out of other datasets.

Tokens are copied by the kernel; the index is written anew.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cream.corpus.encode import HASH_BYTES, EncodedPart, finished_parts
from megatron_cream.corpus.inspection import (
    DUPLICATES,
    FINGERPRINT,
    LISTED_ERRORS,
    Counts,
    Lengths,
    write_metadata,
)
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.readers import lines_before, place
from megatron_cream.corpus.work_folder import WorkFolder
from megatron_cream.data.indexed import write_index
from megatron_cream.data.token_mask import MASK_SUFFIX
from megatron_cream.errors import UserError

_BUCKET_BYTES = 256 << 20  # of memory, for hashes
_HASHED_BYTES = 64  # with what sorting them takes
_COPY_BYTES = 64 << 20


def build_dataset(job: PreprocessJob, units: list[int], folder: WorkFolder) -> None:
    """Make the files of the dataset, at ``folder.staged``, out of all parts of ``units``.

    Raises:
        UserError: a part is missing, a bad record is one too many, or no document is left.
        OSError: they cannot be written.
    """
    config = job.config
    parts = [part for unit in units for part in finished_parts(folder.path, unit, job.dtype)]
    if len({part.unit for part in parts if part.metadata.next is None}) != len(units):
        raise UserError(f"--output-prefix {job.prefix}: {folder.path} lost parts, start again")
    counts = _count_left_out(job, parts)
    segments = [_part_segment(job, part) for part in parts]
    kept = first_copies(segments, str(folder.path)) if config.drop_duplicates else None
    if kept is not None:
        counts.add({DUPLICATES: int((~kept).sum())}, {})
    lengths, documents = assemble(folder.staged, job.dtype, segments, kept, config.thresholds)
    settings = {**job.metadata(), FINGERPRINT: job.fingerprint()}
    if config.shard[1] > 1:
        settings |= {
            "shard": list(config.shard),
            "job": job.digest(),
            "thresholds": config.thresholds,
            "drop_duplicates": config.drop_duplicates,
        }
        if kept is not None:
            write_hashes(folder.staged + ".hashes", segments, kept)
    elif not documents:
        folder.remove()
        raise UserError(_describe_nothing_left(job, counts))
    write_metadata(folder.staged, settings, lengths, documents, counts)


def _part_segment(job: PreprocessJob, part: EncodedPart) -> Segment:
    head, tail = int(job.bos is not None), int(job.eod is not None)
    most = None if job.config.drops_long else job.config.max_tokens
    return Segment(
        part.stem + ".bin",
        part.metadata.documents,
        lambda: split(part.lengths(), most, head, tail),
        part.hashes,
        part.stem + MASK_SUFFIX if part.metadata.masked else None,
    )


def _count_left_out(job: PreprocessJob, parts: list[EncodedPart]) -> Counts:
    """Add up what the parts left out, naming bad records by their line in the file.

    Raises:
        UserError: there is a bad record, and none is to be skipped.
    """
    counts = Counts({"shorter_than_min_tokens": 0, "longer_than_max_tokens": 0, DUPLICATES: 0})
    for part in parts:
        found = part.metadata
        dropped = {"shorter_than_min_tokens": found.shorter, "longer_than_max_tokens": found.longer}
        counts.add(dropped, found.errors)
        counts.longest = max(counts.longest, found.longest)
    counts.list_errors(_list_bad_records(job, parts))
    if counts.errors and job.config.on_error == "fail":
        raise UserError(": ".join(counts.listed[0]))
    return counts


def _list_bad_records(job: PreprocessJob, parts: list[EncodedPart]) -> list[list[str]]:
    """Place and reason of the first bad records, counting the lines of each file once."""
    every = [
        (job.units[part.unit][bad[0]], *bad[1:]) for part in parts for bad in part.metadata.listed
    ]
    every = every[:LISTED_ERRORS]
    starts: dict[str, set[int]] = {}
    for span, *_ in every:
        if span.start:
            starts.setdefault(span.path, set()).add(span.start)
    before = {
        (path, start): lines
        for path, found in starts.items()
        for start, lines in zip(sorted(found), lines_before(path, sorted(found)), strict=True)
    }
    return [
        [place(span, before.get((span.path, span.start), 0) + number), f"{kind}: {detail}"]
        for span, number, kind, detail in every
    ]


def _describe_nothing_left(job: PreprocessJob, counts: Counts) -> str:
    config = job.config
    given = " ".join(config.input)
    if not counts.longest:
        bad = sum(counts.errors.values())
        found = f" ({bad} bad records)" if bad else ""
        return f"--input {given}: holds no text{found}, needs one document that is not empty"
    short = counts.dropped["shorter_than_min_tokens"]
    if short:
        return (
            f"--min-tokens {config.min_tokens}: none of the {short} documents is left, needs at "
            f"most {counts.longest}, the tokens of the longest"
        )
    return f"--max-tokens {config.max_tokens}: all documents are longer, needs more, or to split"


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
    thresholds: tuple[int, ...] = (),
) -> tuple[Lengths, int]:
    """Write ``staged.bin`` and ``staged.idx``, and ``staged.mask`` if a segment has a mask.

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
            lengths, counts = segment.sequences()
            _copy_documents(segment.bin, out.fileno(), lengths, counts, keep, dtype.itemsize)
            lengths, counts = _kept_sequences(lengths, counts, keep)
            counted.add(lengths)
            documents += len(counts)
    if any(segment.mask for segment in segments):
        _write_mask(staged + MASK_SUFFIX, _with_kept(segments, kept))
    every = _with_kept(segments, kept)
    blocks = (_kept_sequences(*segment.sequences(), keep) for segment, keep in every)
    write_index(staged + ".idx", dtype, blocks, counted.documents, documents)
    return counted, documents


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
