# SPDX-License-Identifier: Apache-2.0
"""Reads the records of input files, from any place that an earlier reading reached."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cream.corpus import records
from megatron_cream.corpus.input_files import (
    ARROW,
    JSONL,
    PARQUET,
    STDIN,
    InputFile,
    format_of,
    is_compressed,
    open_stream,
)
from megatron_cream.corpus.records import (
    BadRecord,
    Fields,
    Line,
    Text,
    TextRecord,
    decode,
    join_text_fields,
    read_line,
    validate_text,
)
from megatron_cream.errors import UserError

_BLOCK_BYTES = 256 << 10
_MOST_PARTS = 1_000_000
_BOM = b"\xef\xbb\xbf"
_TABLE_BATCH_BYTES = 8 << 20
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_Batches = Callable[[list[str]], Iterator[Any]]
"""Takes names of columns and yields record batches of a bounded number of rows."""


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
        yield from _read_rows(span, fields, offset, on_bytes)
        return
    with open_stream(Path(span.path), on_bytes) as stream:
        if span.format == JSONL:
            yield from _read_jsonl(stream, span, fields, offset, number)
        elif not offset:
            yield _read_text(stream)


def _read_jsonl(
    stream: BinaryIO, span: InputSpan, fields: Fields, offset: int, number: int
) -> Iterator[TextRecord]:
    at, stop = span.start + offset, sys.maxsize if span.end is None else span.end
    if offset or not span.start:
        _go_to(stream, at)
    else:
        at = _next_line(stream, at - 1, stop)
    while at < stop and (line := _whole_line(stream)):
        at += len(line)
        number += 1
        if number == 1 and not span.start and line.startswith(_BOM):
            line = line[len(_BOM) :]
        if not line or line.isspace():
            continue
        text: Text = ""
        trained = error = None
        try:
            if len(line) > records.LONG_BYTES:
                text = records.stream_json_text(line, fields)
            else:
                text, trained = read_line(line, fields)
        except BadRecord as exc:
            error = exc
        yield TextRecord(text, error, number, at - span.start, trained)


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


def _read_text(stream: BinaryIO) -> TextRecord:
    data = stream.read(records.LONG_BYTES + 1)
    if len(data) > records.LONG_BYTES:
        return TextRecord(records.stream_plain_text(stream, data), None, 0, 1)
    try:
        return TextRecord(validate_text(decode(data.removeprefix(_BOM))), None, 0, 1)
    except BadRecord as exc:
        return TextRecord("", exc, 0, 1)


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


def _read_rows(
    span: InputSpan, fields: Fields, offset: int, on_bytes: Callable[[int], object]
) -> Iterator[TextRecord]:
    size, row = Path(span.path).stat().st_size, 0
    with _open_table(span.path, span.format, fields) as (pa, batches):
        for batch in batches(list(fields.names)):
            count = batch.num_rows
            if row + count > offset:
                skip = max(offset - row, 0)
                columns = [_as_bytes(pa, batch.column(name)) for name in fields.names]
                lists = [column.cast(pa.large_binary()).to_pylist()[skip:] for column in columns]
                for i, values in enumerate(zip(*lists, strict=True), start=row + skip + 1):
                    yield _read_row(values, fields, i)
            row += count
        on_bytes(size)


def _read_row(values: tuple[bytes | None, ...], fields: Fields, row: int) -> TextRecord:
    try:
        if len(values) == 1 and values[0] is not None and len(values[0]) > records.LONG_BYTES:
            stream = io.BytesIO(values[0])
            first = stream.read(records.PIECE_BYTES)
            return TextRecord(records.stream_plain_text(stream, first), None, row, row)
        texts = {
            name: None if value is None else decode(value)
            for name, value in zip(fields.names, values, strict=True)
        }
        return TextRecord(join_text_fields(texts, fields), None, row, row)
    except BadRecord as exc:
        return TextRecord("", exc, row, row)


def validate_columns(path: str, format: str, fields: Fields) -> None:
    """Check that a file is whole and has a column of text under each of ``fields``.

    Raises:
        UserError: naming the file and what is wrong.
    """
    with _open_table(path, format, fields):
        pass


@contextmanager
def _open_table(path: str, format: str, fields: Fields) -> Iterator[tuple[Any, _Batches]]:
    """Yield pyarrow, and what reads the file; damaged data is one line that names the file."""
    try:
        import pyarrow.parquet
    except ImportError as exc:
        raise UserError(
            f"--input {path}: needs the pyarrow package, run `pip install pyarrow`"
        ) from exc
    pa: Any = pyarrow
    try:
        with pa.OSFile(path) as file:
            opened = _open_parquet(pa, file) if format == PARQUET else _open_arrow(pa, file)
            _validate_schema(pa, path, opened[0], fields)
            yield pa, opened[1]
    # Beside exceptions of its own it raises bare ones: OSError for sizes and sums that do not fit,
    # UnicodeDecodeError for names.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        if not (isinstance(exc, OSError) and exc.errno):
            raise UserError(f"{path}: broken {format} data ({exc})") from exc
        if exc.filename is None:  # the disk, not the file
            raise OSError(exc.errno, f"{path}: {exc}") from exc
        raise


def _open_parquet(pa: Any, file: Any) -> tuple[Any, _Batches]:
    reader = pa.parquet.ParquetFile(file, page_checksum_verification=True)

    def batches(names: list[str]) -> Iterator[Any]:
        for group in range(reader.num_row_groups):
            meta = reader.metadata.row_group(group)
            each = max(meta.total_byte_size // max(meta.num_rows, 1), 1)
            rows = min(max(_TABLE_BATCH_BYTES // each, 1), 1 << 14)
            yield from reader.iter_batches(rows, row_groups=[group], columns=names)

    return reader.schema_arrow, batches


def _open_arrow(pa: Any, file: Any) -> tuple[Any, _Batches]:
    """Open a file with a footer, or else a stream."""
    try:
        reader = pa.ipc.open_file(file)
        whole = map(reader.get_batch, range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(max(file.size() - len(_END_OF_ARROW_STREAM), 0))
        if file.read() != _END_OF_ARROW_STREAM:
            raise pa.ArrowInvalid("the file ends before its end mark") from None
        file.seek(0)
        reader = whole = pa.ipc.open_stream(file)

    def batches(names: list[str]) -> Iterator[Any]:
        for batch in whole:
            batch = batch.select(names)
            batch.validate()
            rows = max(batch.num_rows * _TABLE_BATCH_BYTES // max(batch.nbytes, 1), 1)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)

    return reader.schema, batches


def _validate_schema(pa: Any, path: str, schema: Any, fields: Fields) -> None:
    text = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    for name in fields.names:
        if schema.get_field_index(name) < 0:
            raise UserError(
                f"{path}: --json-key {name}: no such column, needs one of {', '.join(schema.names)}"
            )
        found = schema.field(name).type
        if pa.types.is_dictionary(found):
            found = found.value_type
        if found not in text:
            raise UserError(f"{path}: --json-key {name}: a column of {found}, needs text")


def _as_bytes(pa: Any, column: Any) -> Any:
    """Return a column of text as one of bytes, after looking at every offset and index of it.

    Arrow reads wherever the offsets of a damaged file point to, outside its memory too. As bytes,
    so that text which is not UTF-8 is an error of its row.
    """
    column.validate()  # buffers are as long as the number of rows needs
    if pa.types.is_dictionary(column.type):
        values = _as_bytes(pa, column.dictionary)
        column = pa.DictionaryArray.from_arrays(column.indices, values, safe=True)
        column.validate(full=True)
        return column.dictionary_decode()
    types = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    column = column.view(types.get(column.type, column.type))
    column.validate(full=True)
    return column
