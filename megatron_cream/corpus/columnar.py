# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of Parquet and Arrow files, a few at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cream.corpus import records
from megatron_cream.corpus.input_files import PARQUET
from megatron_cream.corpus.records import BadRecord, Fields, TextRecord
from megatron_cream.errors import UserError

_BATCH_BYTES = 8 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_Batches = Callable[[list[str]], Iterator[Any]]
"""Takes names of columns and yields record batches of a bounded number of rows."""


def validate_columns(path: str, format: str, fields: Fields) -> None:
    """Check that a file is whole and has a column of text under each of ``fields``.

    Raises:
        UserError: naming the file and what is wrong.
    """
    with _open_table(path, format, fields):
        pass


def read_rows(
    path: str,
    format: str,
    fields: Fields,
    offset: int,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[TextRecord]:
    """Yield the rows of a file after the first ``offset``.

    Raises:
        UserError: broken data, naming the file.
        OSError: the file cannot be read.
    """
    size, row = Path(path).stat().st_size, 0
    with _open_table(path, format, fields) as (pa, batches):
        for batch in batches(list(fields.names)):
            count = batch.num_rows
            if row + count > offset:
                skip = max(offset - row, 0)
                columns = [_values(pa, batch, name)[skip:] for name in fields.names]
                for i, values in enumerate(zip(*columns, strict=True), start=row + skip + 1):
                    yield _read_row(values, fields, i)
            row += count
        on_bytes(size)


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
            rows = min(max(_BATCH_BYTES // each, 1), 1 << 14)
            yield from reader.iter_batches(rows, row_groups=[group], columns=names)

    return reader.schema_arrow, batches


def _open_arrow(pa: Any, file: Any) -> tuple[Any, _Batches]:
    """Open a file with a footer, or else a stream."""
    try:
        reader = pa.ipc.open_file(file)
        whole = map(reader.get_batch, range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(max(file.size() - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM:
            raise pa.ArrowInvalid("the file ends before its end mark") from None
        file.seek(0)
        reader = whole = pa.ipc.open_stream(file)

    def batches(names: list[str]) -> Iterator[Any]:
        for batch in whole:
            batch = batch.select(names)
            batch.validate()
            rows = max(batch.num_rows * _BATCH_BYTES // max(batch.nbytes, 1), 1)
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


def _values(pa: Any, batch: Any, name: str) -> list[bytes | None]:
    return _as_bytes(pa, batch.column(name)).cast(pa.large_binary()).to_pylist()


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


def _read_row(values: tuple[bytes | None, ...], fields: Fields, row: int) -> TextRecord:
    try:
        if len(values) == 1 and values[0] is not None and len(values[0]) > records.LONG_BYTES:
            stream = io.BytesIO(values[0])
            first = stream.read(records.PIECE_BYTES)
            return TextRecord(records.stream_plain_text(stream, first), None, row, row)
        texts = {
            name: None if value is None else records.decode(value)
            for name, value in zip(fields.names, values, strict=True)
        }
        return TextRecord(records.join_text_fields(texts, fields), None, row, row)
    except BadRecord as exc:
        return TextRecord("", exc, row, row)
