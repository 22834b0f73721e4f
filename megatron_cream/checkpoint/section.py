# SPDX-License-Identifier: Apache-2.0
"""A stretch of a file, as its own file: what readers of zip archives and torch take."""

from __future__ import annotations

import io
import os
from typing import Any


class Section(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

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

    def tell(self) -> int:
        return self._position

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        done = os.preadv(self._descriptor, [view[:count]], self._offset + self._position)
        self._position += done
        return done

    def at(self, position: int, count: int) -> bytes:
        """Return ``count`` bytes from ``position``."""
        self.seek(position)
        return self.read(count)

    def rewound(self) -> Section:
        """Return this section at its start."""
        self.seek(0)
        return self
