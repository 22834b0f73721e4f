# SPDX-License-Identifier: Apache-2.0
"""Stores the finished parts of a job: tokens, lengths, hashes and a note that makes a part count.

A part without its note was being written when its process ended, and is written again.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HASH_BYTES = 16
LISTED_ERRORS = 1000
"""Bad records that are named one by one; all are counted."""


@dataclass
class PartMetadata:
    """What a part holds, and where its unit goes on.

    Attributes:
        documents, tokens: as kept, eod and bos included.
        longest: tokens of the longest document, before eod and bos, kept or not.
        shorter, longer: documents dropped for their length.
        errors: how many bad records of each kind.
        listed: piece of the unit, number in it, kind and detail of bad records.
        next: piece, offset and number that the next part of the unit starts from; None at the end.
        hashed: whether a hash of each document's text is kept.
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    shorter: int = 0
    longer: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    listed: list[tuple[int, int, str, str]] = field(default_factory=list)
    next: tuple[int, int, int] | None = None
    hashed: bool = False


class PartWriter:
    """Takes the documents of one part and makes its files.

    Args:
        folder: where parts are kept.
        unit, number: which part of which unit.
        dtype: of the tokens.
        hashed: whether documents come with hashes.

    Raises:
        OSError: the files cannot be written; nothing then counts as finished.
    """

    def __init__(
        self, folder: Path, unit: int, number: int, dtype: np.dtype, *, hashed: bool
    ) -> None:
        self.note = PartMetadata(hashed=hashed)
        self._stem = part_stem(folder, unit, number)
        self._dtype = dtype
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        # A worker that outlives its killed parent for a moment must not meet the next one's.
        self._own = f"{self._stem}-{uuid.uuid4().hex}.tmp"
        self._file = open(self._own, "wb")  # noqa: SIM115, close() and finish() do

    def close(self) -> None:
        """Close the file; without ``finish`` before, what it holds is gone."""
        self._file.close()
        Path(self._own).unlink(missing_ok=True)

    def add(self, rows: list[np.ndarray], lengths: list[int], hashes: list[bytes]) -> None:
        """Add whole documents: their ids in any number of rows, and the tokens of each."""
        if not lengths:
            return
        # One conversion for many documents; ids are below the vocabulary, so they fit.
        self._file.write(np.concatenate(rows, dtype=self._dtype, casting="unsafe"))
        self._lengths += lengths
        self._hashes += hashes
        self.note.tokens += sum(lengths)

    def mark(self) -> int:
        """Return where the file stands, to ``undo`` a document that is written bit by bit."""
        return self._file.tell()

    def write(self, ids: np.ndarray) -> None:
        """Write some ids of a document that ``add_written`` or ``undo`` ends."""
        self._file.write(ids.astype(self._dtype))

    def add_written(self, length: int, hashes: list[bytes]) -> None:
        """Count the ids written since the last document as one."""
        self._lengths.append(length)
        self._hashes += hashes
        self.note.tokens += length

    def undo(self, mark: int) -> None:
        """Forget what was written after ``mark``."""
        self._file.seek(mark)
        self._file.truncate()

    def count_error(self, piece: int, number: int, kind: str, detail: str) -> None:
        """Note a bad record."""
        self.note.errors[kind] = self.note.errors.get(kind, 0) + 1
        if len(self.note.listed) < LISTED_ERRORS:
            self.note.listed.append((piece, number, kind, detail))

    def finish(self, next_place: tuple[int, int, int] | None) -> None:
        """Make the part count."""
        self.note.documents = len(self._lengths)
        self.note.next = next_place
        _sync_and_close(self._file)
        os.replace(self._own, self._stem + ".bin")
        self._write(".len", np.array(self._lengths, dtype="<i8").tobytes())
        if self.note.hashed:
            self._write(".hash", b"".join(self._hashes))
        self._write(".json", json.dumps(asdict(self.note)).encode())

    def _write(self, suffix: str, data: bytes) -> None:
        with open(self._own, "wb") as file:
            file.write(data)
            _sync_and_close(file)
        os.replace(self._own, self._stem + suffix)


@dataclass(frozen=True)
class EncodedPart:
    """A finished part."""

    stem: str
    unit: int
    note: PartMetadata

    @property
    def bin(self) -> str:
        """The file of its tokens."""
        return self.stem + ".bin"

    def lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document, eod and bos included."""
        return np.fromfile(self.stem + ".len", dtype="<i8")

    def hashes(self) -> np.ndarray:
        """Bytes ``[documents]`` of HASH_BYTES each; only of a hashed part."""
        return np.fromfile(self.stem + ".hash", dtype=f"V{HASH_BYTES}")


def part_stem(folder: Path, unit: int, number: int) -> str:
    """The path of a part's files without their suffix."""
    return str(folder / f"{unit:08d}-{number:06d}")


def finished_parts(folder: Path, unit: int, dtype: np.dtype) -> list[EncodedPart]:
    """Return the whole parts of a unit, in order, as far as they follow each other."""
    parts: list[EncodedPart] = []
    while parts == [] or parts[-1].note.next is not None:
        part = _read_part(part_stem(folder, unit, len(parts)), unit, dtype)
        if part is None:
            break
        parts.append(part)
    return parts


def _read_part(stem: str, unit: int, dtype: np.dtype) -> EncodedPart | None:
    """A part whose files are as long as its note says; None for one that is not whole."""
    try:
        note = _metadata_of(json.loads(Path(stem + ".json").read_bytes()))
        sizes = {".bin": note.tokens * dtype.itemsize, ".len": note.documents * 8}
        if note.hashed:
            sizes[".hash"] = note.documents * HASH_BYTES
        if any(os.path.getsize(stem + suffix) != size for suffix, size in sizes.items()):
            return None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return EncodedPart(stem, unit, note)


def _metadata_of(content: dict[str, Any]) -> PartMetadata:
    note = PartMetadata(**content)
    note.next = None if note.next is None else tuple(note.next)
    return note


def _sync_and_close(file: Any) -> None:
    """A power cut must not leave a note beside tokens that never reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
