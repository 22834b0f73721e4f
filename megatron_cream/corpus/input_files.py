# SPDX-License-Identifier: Apache-2.0
"""Finds the input files of a job and opens them, expanded where they are compressed."""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_cream.errors import UserError

STDIN = Path("-")
JSONL, TEXT, PARQUET, ARROW = "jsonl", "text", "parquet", "arrow"
FORMATS = (JSONL, TEXT, PARQUET, ARROW)
_FORMAT_OF = {
    ".jsonl": JSONL,
    ".json": JSONL,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
_FOLDER_SUFFIXES = frozenset(
    {".jsonl", ".txt", ".md", ".rst", ".py", ".parquet", ".arrow", ".feather"}
)
_COMPRESSED_SUFFIXES = frozenset({".gz", ".xz", ".zst"})
_PACKED_BYTES = 16 << 10  # of zstd at a time: they are expanded whole before any is handed out


@dataclass(frozen=True)
class TextInputs:
    """The files a job reads, in order.

    Attributes:
        files: every file to read; folders and patterns are already expanded, sorted by path.
        skipped: how many files in the folders were of a kind that folders do not take.
        statuses: what the system says of each; None for standard input.
    """

    files: tuple[Path, ...]
    skipped: int
    statuses: tuple[os.stat_result | None, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk (compressed size of compressed ones)."""
        return sum(status.st_size for status in self.statuses if status is not None)


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the job was planned; one that changes since is an error."""

    path: str
    format: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path, format: str, status: os.stat_result | None) -> InputFile:
        """Keep what the system says of a file; standard input, None, has no size."""
        if status is None:
            return cls(str(path), format, 0, 0)
        return cls(str(path), format, status.st_size, status.st_mtime_ns)


def find_inputs(paths: Sequence[str | Path], flag: str = "--input") -> TextInputs:
    """List the files behind `paths` without reading any of them.

    Args:
        paths: files, folders, patterns as ``data/*.jsonl`` or ``data/**/*.gz``, and ``-`` for
            standard input.
        flag: that named them, for messages.

    Raises:
        FileNotFoundError: a path that does not exist, or a pattern without a file.
        UserError: nothing to read, something that is not a regular file, an empty compressed
            file, or a `.zst` file without the `zstandard` package.
    """
    files: list[Path] = []
    skipped = 0
    if "" in map(str, paths):
        raise UserError(f"{flag} '': names nothing, needs a file or a folder")
    for path in map(Path, paths):
        if path == STDIN:
            files.append(path)
        elif path.is_dir():
            found, others = _list_folder(path)
            files += found
            skipped += others
        else:
            files += _match(path, flag)
    if not files:
        given = " ".join(map(str, paths)) or "(nothing)"
        kinds = " ".join(sorted(_FOLDER_SUFFIXES))
        raise UserError(
            f"{flag} {given}: no files to read ({skipped} of other kinds left out), "
            f"needs at least one of {kinds}, plain or .gz, .xz or .zst"
        )
    if files.count(STDIN) > 1:
        raise UserError(f"{flag} - -: standard input can be read once only")
    return TextInputs(tuple(files), skipped, tuple(_validated_status(f, flag) for f in files))


def format_of(path: Path, given: str | None = None) -> str:
    """Return what is in a file: one of FORMATS, by its suffix where it is not ``given``."""
    if path == STDIN:
        return given or JSONL
    return given or _FORMAT_OF.get(_suffixes(path)[0], TEXT)


def is_compressed(path: Path) -> bool:
    """Return whether a file is expanded while it is read."""
    return _suffixes(path)[1] != ""


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that names the content and the one that names the compression, or ""."""
    last = path.suffix.lower()
    if last in _COMPRESSED_SUFFIXES:
        return Path(path.stem).suffix.lower(), last
    return last, ""


def _match(path: Path, flag: str) -> list[Path]:
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{flag} {path}: not found, needs an existing file or folder")
    # A folder that matches is a name of its own; its files need a pattern that reaches them.
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = sorted(name for name in found if not name.is_dir())
    if not files:
        raise FileNotFoundError(f"{flag} {path}: no file matches, needs one that does")
    return files


def _list_folder(folder: Path) -> tuple[list[Path], int]:
    """Return the files under `folder` that folders take, sorted, and the number of the others."""

    def fail(error: OSError) -> None:
        raise error

    # os.walk passes over folders it may not list unless it is told otherwise.
    every = [Path(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names]
    taken = sorted(path for path in every if _suffixes(path)[0] in _FOLDER_SUFFIXES)
    return taken, len(every) - len(taken)


def _validated_status(path: Path, flag: str) -> os.stat_result | None:
    """Look at a file once: on a file system of a cluster that is what many files cost."""
    if path == STDIN:
        return None
    status = None
    with suppress(OSError):  # a link to nothing
        status = path.stat()
    if status is None or not stat.S_ISREG(status.st_mode):
        raise UserError(f"{flag} {path}: not a regular file, needs a file or a folder")
    content, compression = _suffixes(path)
    if compression == ".zst":
        _import_zstandard(path, flag)
    if compression and _FORMAT_OF.get(content) in (PARQUET, ARROW):
        raise UserError(f"{flag} {path}: needs a {content} file that is not compressed again")
    if compression and status.st_size == 0:
        raise UserError(f"{flag} {path}: is empty, needs a whole {compression} file")
    return status


def _import_zstandard(path: Path, flag: str = "--input") -> Any:
    try:
        import zstandard
    except ImportError as exc:
        raise UserError(
            f"{flag} {path}: needs the zstandard package, run `pip install zstandard`"
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
    with open(0 if path == STDIN else path, "rb", buffering=0) as raw:
        file = _CountedFile(raw, on_bytes)
        try:
            yield io.BufferedReader(_expand(file, path), buffer_size=1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, _BrokenStream) as exc:
            raise UserError(f"{path}: byte {file.count}: broken compressed data ({exc})") from exc


def _expand(file: _CountedFile, path: Path) -> Any:
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == ".xz":
        return lzma.LZMAFile(cast(Any, file), mode="rb")
    if compression == ".zst":
        return _ChunkedFile(_expand_zstd(file, _import_zstandard(path)))
    return file


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


def _expand_zstd(file: _CountedFile, zstandard: Any) -> Iterator[bytes]:
    """Yield the content of zstd frames one after another; a file that ends inside one is an error.

    zstandard's own ``stream_reader`` (0.25) takes a file that was cut short for a whole one, which
    would drop the tail of a corpus in silence.
    """
    new_frame, frame = zstandard.ZstdDecompressor().decompressobj, None
    try:
        while packed := file.read(_PACKED_BYTES):
            while packed:
                frame = frame or new_frame()
                yield frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as exc:
        raise _BrokenStream(str(exc)) from exc
    if frame is not None:
        raise _BrokenStream("the file ends inside a zstd frame")


class _ChunkedFile(io.RawIOBase):
    """A raw file of what an iterator gives."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._ready = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (chunk := next(self._chunks, None)) is not None:
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
