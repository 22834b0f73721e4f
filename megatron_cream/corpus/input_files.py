# SPDX-License-Identifier: Apache-2.0
"""Finds the input files of a job, cuts them into spans, opens them expanded."""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_cream.corpus.optional_formats import (
    ARROW,
    PARQUET,
    BrokenStream,
    ChunkedFile,
    expand_zstd,
    import_zstandard,
)
from megatron_cream.errors import UserError

Line = bytes | bytearray
STDIN = Path("-")
JSONL, TEXT = "jsonl", "text"
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
_MOST_PARTS = 1_000_000
_BLOCK_BYTES = 256 << 10


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

    def described(self, format: str | None = None) -> tuple[InputFile, ...]:
        """The files with what is in them: ``format``, or what their suffixes say."""
        formats = (format_of(path, format) for path in self.files)
        return tuple(map(InputFile.of, self.files, formats, self.statuses))


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
        import_zstandard(path, flag)
    if compression and _FORMAT_OF.get(content) in (PARQUET, ARROW):
        raise UserError(f"{flag} {path}: needs a {content} file that is not compressed again")
    if compression and status.st_size == 0:
        raise UserError(f"{flag} {path}: is empty, needs a whole {compression} file")
    return status


@dataclass(frozen=True)
class InputSpan:
    """A stretch of a file.

    Attributes:
        path: the file.
        format: one of ``FORMATS``.
        start, end: bytes; the lines that begin between them belong to it. No end: the whole file.
        size: bytes on disk.
    """

    path: str
    format: str
    start: int = 0
    end: int | None = None
    size: int = 0


def cut_into_units(
    files: tuple[InputFile, ...], part_bytes: int
) -> tuple[tuple[InputSpan, ...], ...]:
    """Return units of at most ``part_bytes``, but for files that are read in one go.

    Plain JSONL is cut at multiples of ``part_bytes``; a line belongs to where it begins.

    Raises:
        UserError: there would be too many for a folder of their files.
    """
    total = sum(file.size for file in files)
    if total // part_bytes > _MOST_PARTS:
        raise UserError(
            f"--part-bytes {part_bytes}: cuts the input into more than {_MOST_PARTS} parts, "
            f"needs {-(-total // _MOST_PARTS)} or more"
        )
    units: list[tuple[InputSpan, ...]] = []
    waiting: list[InputSpan] = []
    room = part_bytes
    for file in files:
        for span in _cut_file(file, part_bytes):
            if waiting and span.size > room:
                units.append(tuple(waiting))
                waiting, room = [], part_bytes
            waiting.append(span)
            room -= span.size
    return (*units, tuple(waiting)) if waiting else tuple(units)


def _cut_file(file: InputFile, part_bytes: int) -> Iterator[InputSpan]:
    path = Path(file.path)
    if file.format != JSONL or is_compressed(path) or path == STDIN:
        yield InputSpan(file.path, file.format, size=file.size)
        return
    for start in range(0, max(file.size, 1), part_bytes):
        end = min(start + part_bytes, file.size)
        yield InputSpan(file.path, file.format, start, end, end - start)


def place(span: InputSpan, number: int) -> str:
    """Return the file and the line or row of a record, for an error.

    Args:
        span: where the record is.
        number: its line or row in the file, counted from 1; 0 where a file is one record.
    """
    unit = "row" if span.format in (PARQUET, ARROW) else "line"
    return f"{span.path}: {unit} {number}" if number else span.path


def lines_before(path: str, starts: list[int]) -> list[int]:
    """Return how many lines of a plain file begin before each of ``starts``, sorted bytes."""
    counts, at, found = [], 0, 0
    with open(path, "rb", buffering=0) as file:
        for start in starts:
            # A line begins at 0 and after each line end, but for one that ends at `start`.
            while at < start - 1 and (block := file.read(min(start - 1 - at, _BLOCK_BYTES))):
                found += block.count(b"\n")
                at += len(block)
            counts.append(found + (start > 0))
    return counts


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
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, BrokenStream) as exc:
            raise UserError(f"{path}: byte {file.count}: broken compressed data ({exc})") from exc


def _expand(file: _CountedFile, path: Path) -> Any:
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == ".xz":
        return lzma.LZMAFile(cast(Any, file), mode="rb")
    if compression == ".zst":
        return ChunkedFile(expand_zstd(file, import_zstandard(path)))
    return file


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


def read_lines(
    span: InputSpan, offset: int = 0, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[Line, int]]:
    """Yield the lines that begin in a span, from ``offset`` on, each with the offset behind it.

    Raises:
        UserError, OSError: as ``open_stream``.
    """
    at, stop = span.start + offset, sys.maxsize if span.end is None else span.end
    with open_stream(Path(span.path), on_bytes) as stream:
        if offset or not span.start:
            _go_to(stream, at)
        else:
            at = _next_line(stream, at - 1, stop)
        while at < stop and (line := _whole_line(stream)):
            at += len(line)
            yield line, at - span.start


def _go_to(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, _BLOCK_BYTES))):
        offset -= len(block)


def _next_line(stream: BinaryIO, at: int, end: int) -> int:
    """Go behind the first line end at or after byte ``at``, or past ``end``; returns where."""
    stream.seek(at)
    while at < end and (piece := stream.readline(_BLOCK_BYTES)):
        at += len(piece)
        if piece.endswith(b"\n"):
            break
    return at


def _whole_line(stream: BinaryIO) -> Line:
    """Return the next line with its end, nothing at the end; a long one is in memory once."""
    line = stream.readline(_BLOCK_BYTES)
    if len(line) < _BLOCK_BYTES:
        return line
    whole = bytearray(line)
    while not whole.endswith(b"\n") and (piece := stream.readline(_BLOCK_BYTES)):
        whole += piece
    return whole
