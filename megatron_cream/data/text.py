# SPDX-License-Identifier: Apache-2.0
"""Reading documents from JSONL and plain text, compressed or not, one document at a time."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

JSONL_SUFFIXES = frozenset({".jsonl", ".json"})
FOLDER_SUFFIXES = frozenset({".jsonl", ".txt", ".md", ".rst", ".py"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})

# Small, because one compressed piece is expanded whole before any of it is handed out.
_ZSTD_PIECE_BYTES = 16 * 1024


@dataclass(frozen=True)
class TextInputs:
    """The files a job reads, in order.

    Attributes:
        files: every file to read; folders are already expanded, sorted by path.
        skipped: how many files in the folders were of a kind that folders do not take.
        total_bytes: size of all files on disk (compressed size of compressed ones).
    """

    files: tuple[Path, ...]
    skipped: int
    total_bytes: int


def find_inputs(paths: Sequence[str | Path]) -> TextInputs:
    """List the files behind `paths` (files and folders) without reading any of them.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: nothing to read, something that is not a regular file, or a `.zst` file
            without the `zstandard` package.
    """
    files: list[Path] = []
    skipped = 0
    for path in map(Path, paths):
        if path.is_dir():
            found, others = _walk(path)
            files += found
            skipped += others
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"--input {path}: not found, needs an existing file or folder")
    if not files:
        given = " ".join(map(str, paths)) or "(nothing)"
        kinds = " ".join(sorted(FOLDER_SUFFIXES))
        raise ValueError(
            f"--input {given}: no files to read ({skipped} of other kinds left out), "
            f"needs at least one of {kinds}, plain or .gz or .zst"
        )
    for path in files:
        _check_file(path)
    return TextInputs(tuple(files), skipped, sum(path.stat().st_size for path in files))


def read_documents(
    path: Path, json_key: str = "text", on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """Yield the documents of one file: one per JSONL line, or the whole of a plain text file.

    Blank JSONL lines are passed over and a byte order mark at the start of the file is removed;
    nothing else is changed, line ends included.

    Args:
        path: the file; its suffix (before `.gz` or `.zst`) says how it is read.
        json_key: the key of a JSONL object that holds the text.
        on_bytes: called with the number of bytes after each read from disk.

    Raises:
        ValueError: not UTF-8, a broken line or a broken compressed stream, naming file and place.
        OSError: the file cannot be read.
    """
    with _open_stream(path, on_bytes) as stream:
        if _suffixes(path)[0] in JSONL_SUFFIXES:
            yield from _read_jsonl(stream, path, json_key)
        else:
            yield _decode(stream.read(), str(path)).removeprefix("\ufeff")


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that names the content and the one that names the compression ("" for none)."""
    last = path.suffix.lower()
    if last in COMPRESSED_SUFFIXES:
        return Path(path.stem).suffix.lower(), last
    return last, ""


def _walk(folder: Path) -> tuple[list[Path], int]:
    """Files under `folder` that folders take, sorted, and the number of the other files."""

    def fail(error: OSError) -> None:
        raise error

    # os.walk passes over folders it may not list unless it is told otherwise.
    every = [Path(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names]
    taken = sorted(path for path in every if _suffixes(path)[0] in FOLDER_SUFFIXES)
    return taken, len(every) - len(taken)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--input {path}: not a regular file, needs a file or a folder")
    if _suffixes(path)[1] == ".zst":
        _import_zstandard(path)


def _import_zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as exc:
        raise ValueError(
            f"--input {path}: needs the zstandard package, run `pip install zstandard`"
        ) from exc
    return zstandard


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

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.count += count
        self._on_bytes(count)
        return count


class _ZstdFile(io.RawIOBase):
    """Decompresses zstd frames one after another.

    The package's own stream_reader takes a stream that was cut short for one that ended, which
    would drop the tail of a corpus in silence.
    """

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


@contextmanager
def _open_stream(path: Path, on_bytes: Callable[[int], object]) -> Iterator[BinaryIO]:
    with open(path, "rb", buffering=0) as raw:
        file = _CountedFile(raw, on_bytes)
        try:
            yield _decompressed(file, path)
        except (gzip.BadGzipFile, EOFError, zlib.error, _BrokenStream) as exc:
            raise ValueError(f"{path}: byte {file.count}: broken compressed data ({exc})") from exc


def _decompressed(file: _CountedFile, path: Path) -> Any:
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(file, _import_zstandard(path)))
    return io.BufferedReader(file, buffer_size=1 << 20)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"{where}: byte {exc.start}: not UTF-8 ({exc.reason})") from exc


def _read_jsonl(stream: BinaryIO, path: Path, json_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        where = f"{path}: line {number}"
        text = _decode(line, where)
        yield _text_of(text.removeprefix("\ufeff") if number == 1 else text, where, json_key)


def _text_of(line: str, where: str, json_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{where}: broken JSON ({exc}), needs one JSON object per line") from exc
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}, needs one JSON object per line")
    value = record.get(json_key)
    if not isinstance(value, str):
        found = type(value).__name__ if json_key in record else "nothing"
        raise ValueError(f"{where}: --json-key {json_key}: {found} there, needs a string")
    try:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ValueError(f"{where}: character {exc.start} is half a surrogate pair") from exc
    return value
