# SPDX-License-Identifier: Apache-2.0
"""Reads sections of files: into given memory, as files of their own, one ahead in a thread."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError


class FileReader:
    """Opens each file when it is first read from, and keeps it open until ``close``."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def read_exactly(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill contiguous uint8 ``out`` from a file at ``offset``.

        Raises:
            UserError: the file ends before that.
        """
        view = memoryview(out).cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{path} ends at byte {offset + done}: it is cut off")
            done += count

    def open_section(self, path: Path, start: int, length: int) -> io.BufferedReader:
        """Return a section of a file as a file of its own, as zipfile and torch read them."""
        return io.BufferedReader(_FileSection(self._descriptor(path), start, length))

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class _FileSection(io.RawIOBase):
    """A section of an open file; ``pread`` leaves the position of the file itself alone."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        done = os.preadv(self._descriptor, [view[:count]], self._offset + self._position)
        self._position += done
        return done


def read_ahead[Read](
    reads: Iterable[Callable[[np.ndarray], Read]], largest: int
) -> Generator[Read, None, None]:
    """Yield what each call returns, while the next one is running in a thread.

    Args:
        reads: each fills the begin of uint8 memory; what it returns is valid until the next one is
            asked for.
        largest: bytes of the memory; there are two of it.
    """
    buffers = [np.empty(largest, np.uint8) for _ in range(2)]
    ahead: Future[Read] | None = None
    with ThreadPoolExecutor(1) as reader:
        for number, read in enumerate(reads):
            following = reader.submit(read, buffers[number % 2])
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
