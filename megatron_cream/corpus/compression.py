# SPDX-License-Identifier: Apache-2.0
"""Files that may be compressed, read as plain bytes; one that is cut short is an error.

A stream that ends early looks like one that ended to more than one library, and would drop the
tail of a corpus in silence.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cream.errors import UserError

COMPRESSED_SUFFIXES = frozenset({".gz", ".xz", ".zst"})

# Small, because one compressed piece is expanded whole before any of it is handed out.
_ZSTD_PIECE_BYTES = 16 * 1024


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that names the content and the one that names the compression, or ""."""
    last = path.suffix.lower()
    if last in COMPRESSED_SUFFIXES:
        return Path(path.stem).suffix.lower(), last
    return last, ""


def import_zstandard(path: Path) -> Any:
    """Return the zstandard package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as exc:
        raise UserError(
            f"--input {path}: needs the zstandard package, run `pip install zstandard`"
        ) from exc
    return zstandard


@contextmanager
def open_stream(
    path: Path, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[BinaryIO]:
    """Open a file for reading, expanded by its suffix; ``-`` is standard input.

    Args:
        path: the file.
        on_bytes: called with the number of bytes after each read from disk.

    Raises:
        UserError: broken or truncated compressed data, on entry or while reading.
        OSError: the file cannot be read.
    """
    with open(0 if str(path) == "-" else path, "rb", buffering=0) as raw:
        file = _CountedFile(raw, on_bytes)
        try:
            yield _decompressed(file, path)
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, _BrokenStream) as exc:
            raise UserError(f"{path}: byte {file.count}: broken compressed data ({exc})") from exc


class _BrokenStream(Exception):
    """The compressed bytes are damaged or end too early."""


class _CountedFile(io.RawIOBase):
    """A raw file that reports how many bytes were read from it."""

    def __init__(self, file: io.FileIO, on_bytes: Callable[[int], object]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self.count = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.count += count
        self._on_bytes(count)
        return count


class _ZstdFile(io.RawIOBase):
    """Decompresses zstd frames one after another."""

    def __init__(self, file: _CountedFile, zstandard: Any) -> None:
        self._file = file
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Expand one more piece; False at a clean end."""
        packed = self._packed or self._file.read(_ZSTD_PIECE_BYTES)
        if not packed:
            if self._frame is not None:
                raise _BrokenStream("the file ends inside a zstd frame")
            return False
        self._frame = self._frame or self._new_frame()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._error as exc:
            raise _BrokenStream(str(exc)) from exc
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True


def _decompressed(file: _CountedFile, path: Path) -> Any:
    compression = suffixes(path)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == ".xz":
        return lzma.LZMAFile(file, mode="rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(file, import_zstandard(path)))
    return io.BufferedReader(file, buffer_size=1 << 20)
