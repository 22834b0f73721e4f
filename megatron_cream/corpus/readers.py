# SPDX-License-Identifier: Apache-2.0
"""Finds input files and reads their records, from any place that an earlier reading reached."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_cream.corpus import jsonl
from megatron_cream.corpus.compression import (
    COMPRESSED_SUFFIXES,
    import_zstandard,
    open_stream,
    suffixes,
)
from megatron_cream.corpus.jsonl import BadRecord, Fields, Line, Record, Text
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
FOLDER_SUFFIXES = frozenset(
    {".jsonl", ".txt", ".md", ".rst", ".py", ".parquet", ".arrow", ".feather"}
)


@dataclass(frozen=True)
class TextInputs:
    """The files a job reads, in order.

    Attributes:
        files: every file to read; folders and patterns are already expanded, sorted by path.
        skipped: how many files in the folders were of a kind that folders do not take.
        total_bytes: size of all files on disk (compressed size of compressed ones).
    """

    files: tuple[Path, ...]
    skipped: int
    total_bytes: int


def find_inputs(paths: Sequence[str | Path]) -> TextInputs:
    """List the files behind `paths` without reading any of them.

    Args:
        paths: files, folders, patterns as ``data/*.jsonl`` or ``data/**/*.gz``, and ``-`` for
            standard input.

    Raises:
        FileNotFoundError: a path that does not exist, or a pattern without a file.
        UserError: nothing to read, something that is not a regular file, an empty compressed
            file, or a `.zst` file without the `zstandard` package.
    """
    files: list[Path] = []
    skipped = 0
    if "" in map(str, paths):
        raise UserError("--input '': names nothing, needs a file or a folder")
    for path in map(Path, paths):
        if path == STDIN:
            files.append(path)
        elif path.is_dir():
            found, others = _walk(path)
            files += found
            skipped += others
        else:
            files += _matches(path)
    if not files:
        given = " ".join(map(str, paths)) or "(nothing)"
        kinds = " ".join(sorted(FOLDER_SUFFIXES))
        raise UserError(
            f"--input {given}: no files to read ({skipped} of other kinds left out), "
            f"needs at least one of {kinds}, plain or .gz, .xz or .zst"
        )
    if files.count(STDIN) > 1:
        raise UserError("--input - -: standard input can be read once only")
    sizes = [_checked_size(path) for path in files]
    return TextInputs(tuple(files), skipped, sum(sizes))


def format_of(path: Path, given: str | None = None) -> str:
    """Return what is in a file: one of FORMATS, by its suffix where it is not ``given``."""
    if path == STDIN:
        return given or JSONL
    return given or _FORMAT_OF.get(suffixes(path)[0], TEXT)


def is_compressed(path: Path) -> bool:
    """Say whether a file is expanded while it is read."""
    return path != STDIN and suffixes(path)[1] != ""


def _matches(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        # A folder that matches is a name of its own; its files need a pattern that reaches them.
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = sorted(name for name in found if not name.is_dir())
        if files:
            return files
        raise FileNotFoundError(f"--input {path}: no file matches, needs one that does")
    raise FileNotFoundError(f"--input {path}: not found, needs an existing file or folder")


def _walk(folder: Path) -> tuple[list[Path], int]:
    """Files under `folder` that folders take, sorted, and the number of the other files."""

    def fail(error: OSError) -> None:
        raise error

    # os.walk passes over folders it may not list unless it is told otherwise.
    every = [Path(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names]
    taken = sorted(path for path in every if suffixes(path)[0] in FOLDER_SUFFIXES)
    return taken, len(every) - len(taken)


def _checked_size(path: Path) -> int:
    if path == STDIN:
        return 0
    if not path.is_file():
        raise UserError(f"--input {path}: not a regular file, needs a file or a folder")
    content, compression = suffixes(path)
    if compression == ".zst":
        import_zstandard(path)
    if compression and _FORMAT_OF.get(content) in (PARQUET, ARROW):
        raise UserError(f"--input {path}: needs a {content} file that is not compressed again")
    size = path.stat().st_size
    if compression in COMPRESSED_SUFFIXES and size == 0:
        raise UserError(f"--input {path}: is empty, needs a whole {compression} file")
    return size


_BLOCK_BYTES = 4 << 20
_AFTER_END_BYTES = 1 << 18
_BLANK = frozenset(b" \t\r\n\v\f")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputSpan:
    """A stretch of a file.

    Attributes:
        path: the file.
        format: one of ``FORMATS``.
        start, end: bytes; the lines that begin between them belong to it. No end: the whole file.
    """

    path: str
    format: str
    start: int = 0
    end: int | None = None


def place(piece: InputSpan, number: int) -> str:
    """Return the file and the line or row of a record, for an error.

    Args:
        piece: where the record is.
        number: its line or row in the file, counted from 1; 0 where a file is one record.
    """
    unit = "row" if piece.format in (PARQUET, ARROW) else "line"
    return f"{piece.path}: {unit} {number}" if number else piece.path


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


def read_span(
    piece: InputSpan,
    fields: Fields,
    offset: int = 0,
    number: int = 0,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[Record]:
    """Yield the records of ``piece``, from ``offset``, where ``number`` ones had been read.

    Raises:
        UserError: broken compressed or columnar data.
        OSError: the file cannot be read.
    """
    if piece.format in (PARQUET, ARROW):
        from megatron_cream.corpus.columnar import read_rows

        yield from read_rows(piece.path, piece.format, fields, offset, on_bytes)
        return
    with open_stream(Path(piece.path), on_bytes) as stream:
        if piece.format == JSONL:
            yield from _read_jsonl(stream, piece, fields, offset, number)
        elif not offset:
            yield _read_text(stream)


def read_documents(
    path: Path, json_key: str = "text", on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """Yield the documents of one file: one per JSONL line or row, or the whole of a plain one.

    Blank JSONL lines are passed over and a byte order mark at the start of the file is removed;
    nothing else is changed, line ends included.

    Args:
        path: the file; its suffix (before that of a compression) says how it is read.
        json_key: the key of a JSONL object, or the column, that holds the text.
        on_bytes: called with the number of bytes after each read from disk.

    Raises:
        UserError: not UTF-8, a broken line or a broken compressed stream, naming file and place.
        OSError: the file cannot be read.
    """
    whole = InputSpan(str(path), format_of(path))
    for record in read_span(whole, Fields((json_key,)), on_bytes=on_bytes):
        if record.error is not None:
            raise UserError(f"{place(whole, record.number)}: {record.error}") from record.error
        yield record.text if isinstance(record.text, str) else "".join(record.text)


def text_of(line: Line, fields: Fields) -> Text:
    """Return the text of one line of JSONL; pieces of a giant one may still raise.

    Raises:
        BadRecord: the line is not an object with strings under ``fields``, or its text holds NUL
            or half a surrogate pair, which no tokenizer takes.
    """
    if len(line) > jsonl.GIANT_BYTES:
        return jsonl.giant_text(line, fields)
    return jsonl.validate_text(jsonl.join_text_fields(jsonl.parse(line), fields))


def _read_text(stream: BinaryIO) -> Record:
    data = stream.read(jsonl.GIANT_BYTES + 1)
    if len(data) > jsonl.GIANT_BYTES:
        return Record(jsonl.stream_text(stream, data), None, 0, 1)
    try:
        text = jsonl.validate_text(jsonl.decode(data.removeprefix(_BOM)))
        return Record(text, None, 0, 1)
    except BadRecord as exc:
        return Record(None, exc, 0, 1)


def _read_jsonl(
    stream: BinaryIO, piece: InputSpan, fields: Fields, offset: int, number: int
) -> Iterator[Record]:
    at = piece.start + offset
    if offset or not piece.start:
        _go_to(stream, at)
    else:
        at = _next_line(stream, piece)
    lines = _lines(stream, at, piece.end)
    for end, line in lines:
        number += 1
        if number == 1 and not piece.start and bytes(line[:3]) == _BOM:
            line = line[3:]
        if not line or (line[0] in _BLANK and bytes(line).isspace()):
            continue
        try:
            yield Record(text_of(line, fields), None, number, end - piece.start)
        except BadRecord as exc:
            yield Record(None, exc, number, end - piece.start)


def _go_to(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, _BLOCK_BYTES))):
        offset -= len(block)


def _next_line(stream: BinaryIO, piece: InputSpan) -> int:
    """Go to the first line that begins in ``piece``, or past its end; returns where."""
    at = piece.start - 1
    stream.seek(at)
    while at < piece.end and (block := stream.read(_AFTER_END_BYTES)):
        stop = block.find(b"\n")
        if stop >= 0:
            stream.seek(at + stop + 1)
            return at + stop + 1
        at += len(block)
    return at


def _lines(stream: BinaryIO, at: int, end: int | None) -> Iterator[tuple[int, Line]]:
    """Yield lines that begin before ``end`` without their ends, and where the next one begins.

    Args:
        stream: stands at byte ``at`` of the file.
        at: where the first line begins.
        end: None for the end of the file.
    """
    pending, reached = bytearray(), at
    while (end is None or at < end) and (block := stream.read(_next_size(reached, end))):
        begin, first = reached, 0
        reached += len(block)
        if pending:
            first = block.find(b"\n") + 1
            if not first:
                pending += block
                continue
            pending += block[: first - 1]
            at = begin + first
            yield at, memoryview(pending)
        view = memoryview(block)
        while (end is None or at < end) and (stop := block.find(b"\n", first)) >= 0:
            line = view[first:stop]
            first = stop + 1
            at = begin + first
            yield at, line
        pending = bytearray(view[first:])
    if pending and (end is None or at < end):
        yield reached, memoryview(pending)


def _next_size(reached: int, end: int | None) -> int:
    if end is None:
        return _BLOCK_BYTES
    return min(_BLOCK_BYTES, max(end - reached, 0) + _AFTER_END_BYTES)
