# SPDX-License-Identifier: Apache-2.0
"""Reads the records of input files, from any place that an earlier reading reached.

A text is a string, or an iterator of pieces where the record is very long. One character outside
Latin-1 makes Python spend two or four bytes on each; so the JSON of a long line is checked with its
long strings left out, and they are decoded while they are tokenized.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_cream.corpus.input_files import (
    JSONL,
    InputSpan,
    Line,
    format_of,
    open_stream,
    place,
    read_lines,
)
from megatron_cream.corpus.optional_formats import ARROW, PARQUET, read_rows
from megatron_cream.errors import UserError

orjson: Any = None
with suppress(ImportError):
    import orjson

Text = str | Iterator[str]

BROKEN_JSON = "broken JSON"
NOT_AN_OBJECT = "not an object"
MISSING_FIELD = "missing field"
WRONG_TYPE = "wrong type"
NOT_UTF8 = "invalid UTF-8"
SURROGATE = "lone surrogate"
NUL = "NUL"
BAD_MASK = "bad mask"

Stretches = list[tuple[int, int]]
"""Of a text: first character of each and the one behind its last, in order and apart."""


class BadRecord(ValueError):
    """A record that holds no text; ``kind`` is one of the constants above."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class TextRecord(NamedTuple):
    """A document, or why there is none.

    Attributes:
        text: its text, to be read before the next record is asked for; "" with an error.
        error: what is wrong with the record.
        number: of its line or row, counted from 1 in its span; 0 for a whole file.
        offset: where the next record starts: expanded bytes from the start of the span, or rows.
        trained: stretches of the text that are trained; None for all of it.
    """

    text: Text
    error: BadRecord | None
    number: int
    offset: int
    trained: Stretches | None = None


@dataclass(frozen=True)
class Fields:
    """Which keys of an object hold the text, and what is put between several of them.

    ``mask`` is the key of the stretches of the text that are trained, None for all of it.
    """

    names: tuple[str, ...] = ("text",)
    separator: str = "\n\n"
    mask: str | None = None


def validate_text(text: str) -> str:
    """Return ``text``.

    Raises:
        BadRecord: it holds NUL.
    """
    if "\0" in text:
        raise BadRecord(NUL, f"character {text.index(chr(0))} is NUL")
    return text


def decode(data: Line) -> str:
    """Return UTF-8 bytes as a string.

    Raises:
        BadRecord: they are not UTF-8.
    """
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as exc:
        raise BadRecord(NOT_UTF8, f"byte {exc.start}: not UTF-8 ({exc.reason})") from exc


def parse(line: Line) -> Any:
    """Return the value of one line of JSON, whichever parser is installed.

    Raises:
        BadRecord: it is not JSON, or a string in it is half a surrogate pair.
    """
    if orjson is not None:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass  # the standard library takes more (NaN, long integers) and says what is wrong
    text = decode(line).removesuffix("\n")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        if "\0" in text:
            raise BadRecord(NUL, f"byte {bytes(line).index(0)} is NUL") from exc
        detail = f"broken JSON ({exc}), needs one JSON object per line"
        raise BadRecord(BROKEN_JSON, detail) from exc
    _validate_surrogates(value)
    return value


def read_line(line: Line, fields: Fields) -> tuple[str, Stretches | None]:
    """Return the text of one line of JSONL, and which of it is trained, None for all of it.

    Raises:
        BadRecord: the line is not an object with strings under ``fields``, its text holds NUL or
            half a surrogate pair, which no tokenizer takes, or the stretches are not such.
    """
    record = parse(line)
    text = validate_text(fields.separator.join(strings_of(record, fields)))
    if fields.mask is None:
        return text, None
    found = record.get(fields.mask)
    if not _are_stretches(found, len(text)):
        raise BadRecord(
            BAD_MASK,
            f"--mask-key {fields.mask}: needs pairs [first, end] of characters of the text, "
            f"{len(text)}, in order, as [[0, 5], [9, 12]]",
        )
    return text, [(first, end) for first, end in found]


def _are_stretches(found: Any, size: int) -> bool:
    before = 0
    stretches: list[Any] = found if isinstance(found, list) else [None]
    for one in stretches:
        pair = isinstance(one, list) and len(one) == 2 and all(type(n) is int for n in one)
        if not pair or not before <= one[0] < one[1] <= size:
            return False
        before = one[1]
    return True


def strings_of(record: Any, fields: Fields) -> list[str]:
    """Return the strings under ``fields`` of a parsed record.

    Raises:
        BadRecord: it is not an object, or has no string under one of them.
    """
    if not isinstance(record, dict):
        found = type(record).__name__
        raise BadRecord(NOT_AN_OBJECT, f"a {found}, needs one JSON object per line")
    values = []
    for name in fields.names:
        if name not in record:
            raise BadRecord(MISSING_FIELD, f"--json-key {name}: nothing there, needs a string")
        value = record[name]
        if not isinstance(value, str):
            found = type(value).__name__
            raise BadRecord(WRONG_TYPE, f"--json-key {name}: {found} there, needs a string")
        values.append(value)
    return values


def _validate_surrogates(value: Any) -> None:
    """The standard library takes half a pair anywhere; orjson does not."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as exc:
                detail = f"character {exc.start} is half a surrogate pair"
                raise BadRecord(SURROGATE, detail) from exc


LONG_BYTES = 32 << 20
"""Lines and files longer than this are read in pieces."""

PIECE_BYTES = 4 << 20

# A string of JSON from quote to quote; possessive, or a long one would be remembered step by step.
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_LONG_STRING_BYTES = 1 << 20
# What is never cut: an escape, a pair of escapes that spell one character.
_WHOLE = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB]..\\u....|\\u(?![dD][89abAB])....|\\[^u])*+", re.DOTALL
)


def stream_json_text(line: Line, fields: Fields) -> Iterator[str]:
    """Yield the text of one long line of JSONL; together they are what ``read_line`` gives.

    Raises:
        BadRecord: as ``read_line``, at once or after some pieces.
    """
    if fields.mask is not None:
        raise BadRecord(
            BAD_MASK,
            f"a line of {len(line)} bytes cannot have a mask, needs at most {LONG_BYTES}",
        )
    spans: list[tuple[int, int]] = []

    def shorten(found: re.Match[bytes]) -> bytes:
        start, end = found.span(1)
        if end - start < _LONG_STRING_BYTES:
            return found.group()
        spans.append((start, end))
        return json.dumps(_placeholder(len(spans) - 1)).encode()

    values = strings_of(parse(_STRING.sub(shorten, line)), fields)
    places = {_placeholder(i): span for i, span in enumerate(spans)}
    for other in places.keys() - set(values):
        for _ in _pieces(line, *places[other]):
            pass
    for i, value in enumerate(values):
        if i:
            yield fields.separator
        if value in places:
            yield from _pieces(line, *places[value])
        else:
            yield validate_text(value)


def stream_plain_text(stream: BinaryIO, first: bytes) -> Iterator[str]:
    """Yield the text of a plain file: ``first``, its first bytes, and what is left in ``stream``.

    Raises:
        BadRecord: it is not UTF-8, or holds NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    data = first.removeprefix(codecs.BOM_UTF8)
    start = len(first) - len(data)  # of what the decoder has not given out yet
    while True:
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as exc:
            detail = f"byte {start + exc.start}: not UTF-8 ({exc.reason})"
            raise BadRecord(NOT_UTF8, detail) from exc
        yield validate_text(text)
        if not data:
            return
        start += waiting + len(data) - len(decoder.getstate()[0])
        data = stream.read(PIECE_BYTES)


def _placeholder(index: int) -> str:
    return f"\0 long string {index}"  # a text with NUL is refused, so no text is taken for this


def _pieces(line: Line, start: int, end: int) -> Iterator[str]:
    view = memoryview(line)
    while start < end:
        window = view[start : min(start + PIECE_BYTES, end)]
        size = len(window)
        if start + size < end:
            whole = _WHOLE.match(window)
            size = (whole.end() if whole else 0) or size
            while size > 1 and view[start + size] & 0xC0 == 0x80:
                size -= 1
        yield _unescaped(window[:size])
        start += size


def _unescaped(piece: memoryview) -> str:
    try:
        text = parse(b'"%b"' % bytes(piece))
    except BadRecord as exc:
        if exc.kind != BROKEN_JSON:
            raise
        raise BadRecord(BROKEN_JSON, f"broken JSON in a long string ({exc})") from exc
    return validate_text(text)


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
    if span.format == JSONL:
        lines = read_lines(span, offset, on_bytes)
        yield from _read_jsonl(lines, fields, number, at_start=not span.start)
    elif span.format in (PARQUET, ARROW):
        for row, values in read_rows(span.path, span.format, fields.names, offset):
            yield _read_row(values, fields, row)
        on_bytes(Path(span.path).stat().st_size)
    elif not offset:
        with open_stream(Path(span.path), on_bytes) as stream:
            yield _read_text(stream)


def _read_jsonl(
    lines: Iterator[tuple[Line, int]], fields: Fields, number: int, at_start: bool
) -> Iterator[TextRecord]:
    for line, behind in lines:
        number += 1
        if number == 1 and at_start and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        if not line or line.isspace():
            continue
        text: Text = ""
        trained = error = None
        try:
            if len(line) > LONG_BYTES:
                text = stream_json_text(line, fields)
            else:
                text, trained = read_line(line, fields)
        except BadRecord as exc:
            error = exc
        yield TextRecord(text, error, number, behind, trained)


def _read_text(stream: BinaryIO, row: int = 0) -> TextRecord:
    """Read all of a stream as one text, of a row or of a whole file."""
    data = stream.read(LONG_BYTES + 1)
    if len(data) > LONG_BYTES:
        return TextRecord(stream_plain_text(stream, data), None, row, row or 1)
    try:
        text = validate_text(decode(data.removeprefix(codecs.BOM_UTF8)))
        return TextRecord(text, None, row, row or 1)
    except BadRecord as exc:
        return TextRecord("", exc, row, row or 1)


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


def _read_row(values: tuple[bytes | None, ...], fields: Fields, row: int) -> TextRecord:
    if len(values) == 1 and values[0] is not None and len(values[0]) > LONG_BYTES:
        return _read_text(io.BytesIO(values[0]), row)
    try:
        texts = {
            name: None if value is None else decode(value)
            for name, value in zip(fields.names, values, strict=True)
        }
        text = validate_text(fields.separator.join(strings_of(texts, fields)))
        return TextRecord(text, None, row, row)
    except BadRecord as exc:
        return TextRecord("", exc, row, row)
