# SPDX-License-Identifier: Apache-2.0
"""Keeps the parts of an unfinished job, and moves its finished files into place.

A part is some files in the job's folder: tokens, lengths, hashes and masks where asked for, and the
metadata that makes it count. One without its metadata was being written when its process ended, and
is written again.

One process at a time, one job, and no part of another. All files of a dataset are moved, or none: a
mark beside the staged files says that they are whole. A process that is killed while it moves them
leaves the mark, and the next one goes on moving.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from megatron_cream import ownership
from megatron_cream.corpus.assemble import HASH_BYTES
from megatron_cream.data.indexed import INDEX_MAGIC, MASK_SUFFIX
from megatron_cream.errors import UserError

# In the order they are put in place: megatron finds a dataset by its .idx. The hashes are there
# for shards of a job that drops duplicates only, the mask where not every token is trained.
SUFFIXES = (".bin", ".hashes", ".mask", ".json", ".idx")

PREPROCESSING, MERGING, RETRIEVAL = "preprocessing", "merging", "retrieval"
"""Kinds of jobs, as they stand in the mark of a folder."""

_JOB, _STAGED, _WHOLE = "job.json", "data", ".whole"


def validate_prefix(prefix: str) -> None:
    """Check that an output names a file, in a place where a folder can be made.

    Raises:
        UserError: naming ``--output-prefix`` and what it needs.
    """
    where = f"--output-prefix {prefix}"
    folder, name = os.path.split(prefix)
    if name in ("", ".", ".."):
        raise UserError(f"{where}: names a folder, needs FOLDER/NAME")
    there = folder or "."
    while not os.path.lexists(there):
        there = os.path.dirname(there) or "."
    if not os.path.isdir(there):
        raise UserError(f"{where}: {there} is not a folder, needs one to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{where}: folder {there} needs to be writable")


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
    described, indexed = _is_metadata(prefix + ".json"), _is_index(prefix + ".idx")
    for path in found:
        if not (described if path.endswith(".json") else described or indexed):
            raise UserError(
                f"--output-prefix {prefix}: {path} is not of a dataset, which is all that "
                "--overwrite replaces, needs a new prefix, or that file to be moved away"
            )


def _is_metadata(path: str) -> bool:
    """Return whether a file is one that preprocessing or merging wrote beside a dataset."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "format_version" in content and "vocab_size" in content


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

    def is_of(self, identity: dict[str, Any]) -> bool:
        """Return whether the parts here are of the job of this ``identity`` (see ``claim``)."""
        return self._found() == json.loads(json.dumps(identity))

    def claim(self, identity: dict[str, Any], *, restart: bool) -> int:
        """Make the folder this job's; returns how many parts it has already.

        Args:
            identity: all that decides the bytes of the job's parts.
            restart: whether what another job left is deleted.

        Raises:
            UserError: it holds parts of another job.
        """
        found = None if restart else self._found()
        if found is None:
            ownership.empty(self.path, self.kind)
        elif not self.is_of(identity):
            self._raise_other_job(found, json.loads(json.dumps(identity)))
        write_whole(str(self.path / _JOB), json.dumps(identity).encode())
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
        write_whole(self.staged + _WHOLE, json.dumps(new).encode())
        try:
            self.finish_publishing()
        except BaseException:
            if self.is_whole():
                _restore(self.staged, self.prefix, new)
                os.unlink(self.staged + _WHOLE)
            raise

    def finish_publishing(self) -> None:
        """Move what is not in place yet of a whole dataset, if there is one.

        Raises:
            UserError: the mark that says that it is whole is damaged.
        """
        if not self.is_whole():
            return
        new, staged, prefix = self._names_in_mark(), self.staged, self.prefix
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
        os.unlink(staged + _WHOLE)

    def remove(self) -> None:
        """Delete the folder; a new process may make it again at once."""
        ownership.remove(self.path, self.kind)
        self._removed = True

    def drop_unit(self, unit: int) -> None:
        """Delete the parts of a unit whose input cannot be read a second time."""
        for path in self.path.glob(f"{unit:08d}-*"):
            path.unlink()

    def _names_in_mark(self) -> list[str]:
        mark = self.staged + _WHOLE
        try:
            with open(mark, "rb") as file:
                new = json.load(file)
        except ValueError:
            new = None
        if not isinstance(new, list) or not set(map(str, new)) <= set(SUFFIXES):
            raise UserError(f"{mark} is damaged, needs its folder to be removed")
        return new

    def _found(self) -> dict[str, Any] | None:
        """The identity of the job whose parts are here, None without one."""
        path = self.path / _JOB
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"--output-prefix {self.prefix}: {path} is damaged, needs --restart to begin anew"
            )
        return found

    def _raise_other_job(self, found: dict[str, Any], wanted: dict[str, Any]) -> NoReturn:
        name = next((name for name in wanted if found.get(name) != wanted[name]), "version")
        raise UserError(
            f"--output-prefix {self.prefix}: {self.path} holds an unfinished job with another "
            f"{name} ({_short(found.get(name))}, this one {_short(wanted.get(name))}); needs the "
            "same settings to continue, or --restart"
        )


def _restore(staged: str, prefix: str, new: list[str]) -> None:
    for suffix in reversed(new):
        if not os.path.exists(staged + suffix):
            os.rename(prefix + suffix, staged + suffix)
    for suffix in SUFFIXES:
        if os.path.lexists(staged + ".old" + suffix):
            os.rename(staged + ".old" + suffix, prefix + suffix)


def write_whole(path: str, data: bytes) -> None:
    """Write a file that is there with all of ``data`` or not at all, also after a power cut."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            sync_and_close(file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    ownership.sync(os.path.dirname(path) or ".")


def temporary_name(path: str) -> str:
    """Return a name beside ``path`` that no other process takes; ``claim`` deletes what is left."""
    return f"{path}-{uuid.uuid4().hex}.tmp"


def sync_and_close(file: BinaryIO) -> None:
    """Close a file once it is on the disk: a power cut must not leave a mark without its data."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


UnitPlace = tuple[int, int, int]
"""A record of a unit: which span, offset in it, and how many records of the span are before it."""


@dataclass
class PartMetadata:
    """What a part holds, and where its unit goes on.

    Attributes:
        documents, tokens: as kept, eod and bos included.
        longest: tokens of the longest document, before eod and bos, kept or not.
        shorter, longer: documents dropped for their length.
        errors: how many bad records of each kind.
        listed: span of the unit, number in it, kind and detail of bad records.
        next: where the next part of the unit starts; None at the end.
        hashed: whether a hash of each document's text is kept.
        masked: whether a mask says which tokens are trained.
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    shorter: int = 0
    longer: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    listed: list[tuple[int, int, str, str]] = field(default_factory=list)
    next: UnitPlace | None = None
    hashed: bool = False
    masked: bool = False


@dataclass(frozen=True)
class EncodedPart:
    """A finished part."""

    stem: str
    unit: int
    metadata: PartMetadata

    def lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document, eod and bos included."""
        return np.fromfile(self.stem + ".len", dtype="<i8")

    def hashes(self) -> np.ndarray:
        """Bytes ``[documents]`` of HASH_BYTES each; only of a hashed part."""
        return np.fromfile(self.stem + ".hash", dtype=f"V{HASH_BYTES}")


def finished_parts(folder: Path, unit: int, dtype: np.dtype) -> list[EncodedPart]:
    """Return the whole parts of a unit, in order, as far as they follow each other."""
    parts: list[EncodedPart] = []
    while parts == [] or parts[-1].metadata.next is not None:
        part = _read_part(part_stem(folder, unit, len(parts)), unit, dtype)
        if part is None:
            break
        parts.append(part)
    return parts


def part_stem(folder: Path, unit: int, number: int) -> str:
    """Return the path of a part without suffix."""
    return str(folder / f"{unit:08d}-{number:06d}")


def _read_part(stem: str, unit: int, dtype: np.dtype) -> EncodedPart | None:
    """Return a part, None where its files are not as long as its metadata says."""
    try:
        found = PartMetadata(**json.loads(Path(stem + ".json").read_bytes()))
        if found.next is not None:
            span, offset, number = found.next
            found.next = (span, offset, number)
        sizes = {".bin": found.tokens * dtype.itemsize, ".len": found.documents * 8}
        if found.hashed:
            sizes[".hash"] = found.documents * HASH_BYTES
        if found.masked:
            sizes[MASK_SUFFIX] = found.tokens
        if any(os.path.getsize(stem + suffix) != size for suffix, size in sizes.items()):
            return None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return EncodedPart(stem, unit, found)
