# SPDX-License-Identifier: Apache-2.0
"""Reads the records of input files, from any place that an earlier reading reached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_cream.corpus import records
from megatron_cream.corpus.input_files import ARROW, JSONL, PARQUET, format_of, open_stream
from megatron_cream.corpus.records import BadRecord, Fields, Line, TextRecord
from megatron_cream.errors import UserError

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


def read_span(
    span: InputSpan,
    fields: Fields,
    offset: int = 0,
    number: int = 0,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[TextRecord]:
    """Yield the records of ``span``, from ``offset``, where ``number`` ones had been read.

    Raises:
        UserError: broken compressed or columnar data.
        OSError: the file cannot be read.
    """
    if span.format in (PARQUET, ARROW):
        from megatron_cream.corpus.columnar import read_rows

        yield from read_rows(span.path, span.format, fields, offset, on_bytes)
        return
    with open_stream(Path(span.path), on_bytes) as stream:
        if span.format == JSONL:
            yield from _read_jsonl(stream, span, fields, offset, number)
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


def _read_text(stream: BinaryIO) -> TextRecord:
    data = stream.read(records.LONG_BYTES + 1)
    if len(data) > records.LONG_BYTES:
        return TextRecord(records.stream_plain_text(stream, data), None, 0, 1)
    try:
        text = records.validate_text(records.decode(data.removeprefix(_BOM)))
        return TextRecord(text, None, 0, 1)
    except BadRecord as exc:
        return TextRecord("", exc, 0, 1)


def _read_jsonl(
    stream: BinaryIO, span: InputSpan, fields: Fields, offset: int, number: int
) -> Iterator[TextRecord]:
    at, stop = span.start + offset, sys.maxsize if span.end is None else span.end
    if offset or not span.start:
        _go_to(stream, at)
    else:
        at = _next_line(stream, span.start - 1, stop)
    for end, line in _lines(stream, at, stop):
        number += 1
        if number == 1 and not span.start and bytes(line[:3]) == _BOM:
            line = line[3:]
        if not line or (line[0] in _BLANK and bytes(line).isspace()):
            continue
        try:
            if fields.mask is None:
                yield TextRecord(records.text_of(line, fields), None, number, end - span.start)
            else:
                text, trained = records.masked_text_of(line, fields)
                yield TextRecord(text, None, number, end - span.start, trained)
        except BadRecord as exc:
            yield TextRecord("", exc, number, end - span.start)


def _go_to(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, _BLOCK_BYTES))):
        offset -= len(block)


def _next_line(stream: BinaryIO, at: int, end: int) -> int:
    """Go behind the first line end at or after byte ``at``, or past ``end``; returns where."""
    stream.seek(at)
    while at < end and (block := stream.read(_AFTER_END_BYTES)):
        stop = block.find(b"\n")
        if stop >= 0:
            stream.seek(at + stop + 1)
            return at + stop + 1
        at += len(block)
    return at


def _lines(stream: BinaryIO, at: int, end: int) -> Iterator[tuple[int, Line]]:
    """Yield lines that begin before byte ``end``, without their ends, and where the next begins.

    Args:
        stream: stands at byte ``at`` of the file, where the first line begins.
    """
    pending, reached = bytearray(), at
    while at < end:
        # Little more than the span: the last line goes on behind it.
        block = stream.read(min(_BLOCK_BYTES, max(end - reached, 0) + _AFTER_END_BYTES))
        if not block:
            break
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
        while at < end and (stop := block.find(b"\n", first)) >= 0:
            line = view[first:stop]
            first = stop + 1
            at = begin + first
            yield at, line
        pending = bytearray(view[first:])
    if pending and at < end:
        yield reached, memoryview(pending)
