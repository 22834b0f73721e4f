# SPDX-License-Identifier: Apache-2.0
"""Keeps the parts of an unfinished job, joins them into a dataset, and moves that into place.

One process at a time, one job, and no part of another. All files of a dataset are moved, or none: a
mark beside the staged files says that they are whole. A process that is killed while it moves them
leaves the mark, and the next one goes on moving.

Tokens are copied by the kernel; the index is written anew. Megatron's own writer keeps a Python
integer for every document, this one an array.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream import ownership
from megatron_cream.data.indexed import INDEX_HEADER, INDEX_MAGIC, MASK_SUFFIX, TOKEN_DTYPES
from megatron_cream.errors import UserError

# In the order they are put in place: megatron finds a dataset by its .idx. The hashes are there
# for shards of a job that drops duplicates only, the mask where not every token is trained.
SUFFIXES = (".bin", ".hashes", ".mask", ".json", ".idx")

PREPROCESSING, MERGING, RETRIEVAL = "preprocessing", "merging", "retrieval"
"""Kinds of jobs, as they stand in the mark of a folder."""

_JOB, _STAGED, _WHOLE = "job.json", "data", ".whole"
HASH_BYTES = 16
_COPY_BYTES = 64 << 20


def validate_absent(prefix: str, overwrite: bool) -> None:
    """Check that no file of a dataset is at a prefix, unless it may be overwritten.

    Only a dataset may be: a file of another kind that happens to have one of the names is kept.

    Raises:
        UserError: naming the file.
    """
    found = [prefix + suffix for suffix in SUFFIXES if os.path.lexists(prefix + suffix)]
    if found and not overwrite:
        raise UserError(
            f"--output-prefix {prefix}: {found[0]} exists, needs a new prefix or --overwrite"
        )
    note = _read_json(prefix + ".json") if os.path.isfile(prefix + ".json") else None
    described = isinstance(note, dict) and note.keys() >= {"format_version", "vocab_size"}
    indexed = _is_index(prefix + ".idx")
    for path in found:
        if not (described if path.endswith(".json") else described or indexed):
            raise UserError(
                f"--output-prefix {prefix}: {path} is not of a dataset, which is all that "
                "--overwrite replaces, needs a new prefix, or that file to be moved away"
            )


def _read_json(path: str | Path) -> Any:
    """Return what a file of JSON holds, None for a damaged one."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return None


def _is_index(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC
    except OSError:
        return False


class WorkFolder:
    """``PREFIX.parts``, locked for this process until it is closed.

    The lock is on the mark that says that this tool made the folder. The folder of the output is
    made if it is missing.

    Args:
        prefix: the output.
        kind: of the job, one of the constants above.

    Raises:
        UserError: there is such a folder, and it is not of an unfinished job of this kind.
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """

    def __init__(self, prefix: str, kind: str) -> None:
        self.prefix, self.kind = prefix, kind
        self.path = Path(prefix + ".parts")
        self.staged = str(self.path / _STAGED)
        """Where the files of the dataset are made, without suffix."""
        self._removed = False
        where = f"--output-prefix {prefix}"
        self._lock = ownership.lock(self.path, kind, where, "another prefix")

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        """Keep what was finished; a folder without any of it goes."""
        try:
            if not self._removed and not any(self.path.glob("*-*.json")) and not self.is_whole():
                self.remove()
        finally:
            os.close(self._lock)

    def release(self) -> None:
        """In a forked worker: close its copy of the lock, which is to end with this process."""
        os.close(self._lock)

    def is_whole(self) -> bool:
        """Return whether a whole dataset is here that was not, or in part, moved to its place."""
        return os.path.exists(self.staged + _WHOLE)

    def claim(self, identity: dict[str, Any], *, restart: bool, overwrite: bool) -> int:
        """Make the folder this job's; returns how many parts it has already.

        Args:
            identity: all that decides the bytes of the job's parts.
            restart: whether what another job left is deleted.
            overwrite: whether a dataset that is there may be replaced.

        Raises:
            UserError: it holds parts of another job, or there is a dataset.
        """
        validate_absent(self.prefix, overwrite)
        found = None if restart else self._found()
        if found is None:
            ownership.empty(self.path, self.kind)
        elif found != (wanted := _as_json(identity)):
            name = next((name for name in wanted if found.get(name) != wanted[name]), "version")
            values = [json.dumps(job.get(name)) for job in (found, wanted)]
            there, here = (text if len(text) <= 200 else f"{text[:200]}..." for text in values)
            raise UserError(
                f"--output-prefix {self.prefix}: {self.path} holds an unfinished job with another "
                f"{name} ({there}, this one {here}); needs the same settings to continue, or "
                "--restart"
            )
        ownership.write_whole(str(self.path / _JOB), json.dumps(identity).encode())
        for pattern in (f"{_STAGED}.*", "*.tmp"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        return len(list(self.path.glob("*-*.json")))

    def publish(self, overwrite: bool) -> None:
        """Move the staged files into place, or leave everything as it was.

        Args:
            overwrite: whether a dataset that is there may be replaced.
        """
        new = [suffix for suffix in SUFFIXES if os.path.exists(self.staged + suffix)]
        for suffix in new:
            ownership.sync(self.staged + suffix)
        # Once more: another job may have written there since this one was checked.
        validate_absent(self.prefix, overwrite)
        ownership.write_whole(self.staged + _WHOLE, json.dumps(new).encode())
        try:
            self.finish_publishing()
        except BaseException:
            if self.is_whole():
                _restore(self.staged, self.prefix, new)
                os.unlink(self.staged + _WHOLE)
            raise

    def finish_publishing(self, identity: dict[str, Any] | None = None) -> bool:
        """Move what is not in place yet of a whole dataset; returns whether ``identity`` made it.

        Raises:
            UserError: the mark that says that it is whole is damaged.
        """
        if not self.is_whole():
            return False
        own = identity is not None and self._found() == _as_json(identity)
        staged, prefix, mark = self.staged, self.prefix, self.staged + _WHOLE
        new = _read_json(mark)
        if not isinstance(new, list) or not set(map(str, new)) <= set(SUFFIXES):
            raise UserError(f"{mark} is damaged, needs its folder to be removed")
        # The old .idx goes first, so that it is never seen beside the new .bin.
        for suffix in reversed(SUFFIXES):
            in_place = suffix in new and not os.path.exists(staged + suffix)
            if os.path.lexists(prefix + suffix) and not in_place:
                os.rename(prefix + suffix, staged + ".old" + suffix)
        for suffix in SUFFIXES:
            if os.path.exists(staged + suffix):
                os.rename(staged + suffix, prefix + suffix)
        ownership.sync(os.path.dirname(prefix) or ".")
        # From here on the dataset stands for itself, whatever comes of the folder it was made in.
        os.unlink(mark)
        return own

    def remove(self) -> None:
        """Delete the folder; a new process may make it again at once."""
        ownership.remove(self.path, self.kind)
        self._removed = True

    def _found(self) -> dict[str, Any] | None:
        """The identity of the job whose parts are here, None without one."""
        path = self.path / _JOB
        if not path.exists():
            return None
        found = _read_json(path)
        if not isinstance(found, dict):
            raise UserError(
                f"--output-prefix {self.prefix}: {path} is damaged, needs --restart to begin anew"
            )
        return found


def _restore(staged: str, prefix: str, new: list[str]) -> None:
    for suffix in reversed(new):
        if not os.path.exists(staged + suffix):
            os.rename(prefix + suffix, staged + suffix)
    for suffix in SUFFIXES:
        if os.path.lexists(staged + ".old" + suffix):
            os.rename(staged + ".old" + suffix, prefix + suffix)


def _as_json(identity: dict[str, Any]) -> Any:
    return json.loads(json.dumps(identity))  # tuples are lists in a file


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
    longest = np.iinfo(np.int32).max
    header = INDEX_HEADER.pack(INDEX_MAGIC, 1, code, sequences, documents + 1)
    at = [len(header), len(header) + 4 * sequences, len(header) + 12 * sequences]
    byte = sequence = 0
    with open(path, "wb") as file:
        file.write(header)
        file.seek(at[2])
        file.write(bytes(8))  # the first document begins at sequence 0
        at[2] += 8
        for lengths, counts in blocks:
            if lengths.max(initial=0) > longest:
                found = f"a document has {lengths.max()} tokens and an index can hold {longest}"
                raise UserError(f"--max-tokens: {found}, needs a limit below that")
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
