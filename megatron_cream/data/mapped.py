# SPDX-License-Identifier: Apache-2.0
"""Maps files into memory: tokens, and arrays that take long to make and are kept in files.

What is mapped is in memory once per node, whatever the number of ranks and data workers, and only
where it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cream import ownership
from megatron_cream.errors import UserError

_LONG_BYTES = 1 << 14
_SAMPLED = 64  # places of an array that its checksum is of
_PLACE_BYTES = 64
_SUM_BYTES = 4


class MappedFile:
    """All of a file as one array, for reading at random places.

    The system reads pages around the one asked for, megabytes on many machines, which a place
    elsewhere makes no use of. Here it reads what is asked for.

    Attributes:
        array: ``[file size / itemsize]``, not to be written to.
        long: items in a span that is worth a system call to read all of it at once.
    """

    def __init__(self, path: str, dtype: Any) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self.array = np.frombuffer(self._map, dtype=dtype)
        self.long = _LONG_BYTES // self.array.itemsize

    def read_ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        """Start reading the long ones of some spans, each a first item and a number of items."""
        itemsize = self.array.itemsize
        for first, count in spans:
            if count >= self.long:
                start = first * itemsize // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, (first + count) * itemsize - start)


class MappedArray(np.ndarray):
    """An array that is mapped from a file of ``ArrayCache`` and pickled as the name of it."""

    path = ""  # a view of it has none, and is pickled as any array

    def __reduce__(self) -> Any:
        return (_open, (self.path,)) if self.path else super().__reduce__()


@dataclass(frozen=True)
class ArrayCache:
    """Arrays in files of a folder, made by the first process that asks and mapped by all.

    A file is named by a hash of all that decides its array, so that an old one is not found. It is
    renamed to that name when it is whole, and ends with a checksum of 64 places: one that is
    damaged is made anew.

    Attributes:
        folder: is made if it is missing.
        key: what decides every array, as JSON.
    """

    folder: str
    key: dict[str, Any]

    def array(
        self, name: str, build: Callable[[], Iterable[np.ndarray]], **more: Any
    ) -> np.ndarray:
        """Return an array, mapped.

        Args:
            name: the file's name begins with it.
            build: returns the array in blocks, one at least.
            more: what decides this array beside ``key``.

        Raises:
            UserError: the folder cannot be written to.
            Exception: what ``build`` raises, as it is.
        """
        text = json.dumps({**self.key, **more}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        path = os.path.join(self.folder, f"{name}-{digest}.npy")
        try:
            found = _open_whole(path)
            return self._make(path, build) if found is None else found
        except _NotBuilt as failed:
            raise failed.error from None
        except OSError as error:
            raise UserError(
                f"{self.folder} must hold the index of samples, and cannot ({error}): give "
                "--data-cache-path a folder that can be written to"
            ) from error

    def _make(self, path: str, build: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
        os.makedirs(self.folder, exist_ok=True)
        with _one_process_per_node(self.folder):
            found = _open_whole(path)  # another one may have made it meanwhile
            if found is None:
                _remove_left(self.folder)
                _write(path, _apart(build))
                found = _open(path)
        return found


class _NotBuilt(Exception):
    """What stands in the array could not be read: nothing that the folder of the cache has done."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _apart(build: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    try:
        yield from build()
    except OSError as error:
        raise _NotBuilt(error) from error


_KIND = "index of samples"  # in the mark of the folder of a file in the making
_LEFT_SECONDS = 3600.0


@contextmanager
def _unfinished(folder: str) -> Iterator[Path]:
    """Give a folder for a file in the making, with a mark that is locked while there is one."""
    with tempfile.TemporaryDirectory(".partial", "megatron_cream-", folder) as name:
        ownership.mark(Path(name), _KIND)
        with open(Path(name) / ownership.MARK_NAME) as held:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
            yield Path(name)


def _remove_left(folder: str) -> None:
    """Remove what killed processes left: with our mark, locked by none, an hour old.

    Where a file system has no locks nothing says that a process is gone, and all stays.
    """
    for left in Path(folder).glob("megatron_cream-*.partial"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in [left, *left.iterdir()])
            if ownership.marked_kind(left) == _KIND and time.time() - newest > _LEFT_SECONDS:
                with open(left / ownership.MARK_NAME) as held:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)


@contextmanager
def _one_process_per_node(folder: str) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Where a file system has no locks several may make the file, each under another name.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: str, blocks: Iterable[np.ndarray]) -> None:
    with _unfinished(os.path.dirname(path)) as folder:
        partial = str(folder / "array")
        with open(partial, "wb") as file:
            size, dtype = 0, None
            for block in blocks:
                if dtype is None:
                    dtype = block.dtype
                    _write_header(file, dtype, 0)
                file.write(np.ascontiguousarray(block).data)
                size += len(block)
            file.flush()
            file.seek(0)
            _write_header(file, dtype, size)
            file.seek(0, os.SEEK_END)
            file.write(bytes(_SUM_BYTES))
        with open(partial, "r+b") as file:
            total = _checksum(file, _open(partial).nbytes)
            file.seek(-_SUM_BYTES, os.SEEK_END)
            file.write(total)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def _write_header(file: BinaryIO, dtype: Any, size: int) -> None:
    """Numpy leaves room for a size to grow, so that the header may be written once more."""
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


def _open(path: str) -> MappedArray:
    """Map an array, whose file has the size that its header says.

    Raises:
        ValueError: it has another.
    """
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        (size,), _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
        if os.path.getsize(path) != offset + size * dtype.itemsize + _SUM_BYTES:
            raise ValueError(f"{path} has not the size that its header says")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    array = np.ndarray.__new__(MappedArray, (size,), dtype, mapped, offset)
    array.path = path
    return array


def _open_whole(path: str) -> MappedArray | None:
    """Map an array; None where there is no file, or a damaged one."""
    try:
        array = _open(path)
        with open(path, "rb") as file:
            total = _checksum(file, array.nbytes)
            file.seek(-_SUM_BYTES, os.SEEK_END)
            return array if file.read() == total else None
    except (FileNotFoundError, ValueError):
        return None


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Of places of the ``size`` bytes before the checksum, read and not mapped."""
    start = os.fstat(file.fileno()).st_size - _SUM_BYTES - size
    places = range(start, start + size, max(size // _SAMPLED, _PLACE_BYTES))
    total = 0
    for place in places:
        count = min(_PLACE_BYTES, start + size - place)
        total = zlib.crc32(os.pread(file.fileno(), count, place), total)
    return total.to_bytes(_SUM_BYTES, "little")
