# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of Parquet and Arrow files, a few at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_cream.corpus import jsonl
from megatron_cream.corpus.jsonl import BadRecord, Fields, Record
from megatron_cream.corpus.readers import PARQUET
from megatron_cream.errors import UserError

_BATCH_BYTES = 8 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def import_pyarrow(path: str) -> Any:
    """Return the pyarrow package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as exc:
        raise UserError(
            f"--input {path}: needs the pyarrow package, run `pip install pyarrow`"
        ) from exc
    return pyarrow


def validate_columns(path: str, format: str, fields: Fields) -> None:
    """Refuse a file that has no column of text under each of ``fields``, or is not whole.

    Raises:
        UserError: naming the file and what is wrong.
    """
    pa = import_pyarrow(path)
    with _broken(pa, path, format), _Source(path, format) as source:
        _check_schema(pa, path, source.schema, fields)


def _check_schema(pa: Any, path: str, schema: Any, fields: Fields) -> None:
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


def read_rows(
    path: str,
    format: str,
    fields: Fields,
    offset: int,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[Record]:
    """Yield the rows of a file after the first ``offset``.

    Raises:
        UserError: broken data, naming the file.
        OSError: the file cannot be read.
    """
    pa = import_pyarrow(path)
    size, row = Path(path).stat().st_size, 0
    with _broken(pa, path, format), _Source(path, format) as source:
        _check_schema(pa, path, source.schema, fields)
        for batch in source.batches(list(fields.names)):
            count = batch.num_rows
            if row + count > offset:
                skip = max(offset - row, 0)
                columns = [_values(pa, batch, name)[skip:] for name in fields.names]
                for i, values in enumerate(zip(*columns, strict=True), start=row + skip + 1):
                    yield _record(values, fields, i)
            row += count
        on_bytes(size)


def _values(pa: Any, batch: Any, name: str) -> list[bytes | None]:
    return _checked(pa, batch.column(name)).cast(pa.large_binary()).to_pylist()


def _checked(pa: Any, column: Any) -> Any:
    """Return a column of text as one of bytes, after looking at every offset and index of it.

    Arrow reads wherever the offsets of a damaged file point to, outside its memory too. As bytes,
    so that text which is not UTF-8 is an error of its row.
    """
    column.validate()  # buffers are as long as the number of rows needs
    if pa.types.is_dictionary(column.type):
        values = _checked(pa, column.dictionary)
        column = pa.DictionaryArray.from_arrays(column.indices, values, safe=True)
        column.validate(full=True)
        return column.dictionary_decode()
    column = column.view(_bytes_of(pa, column.type))
    column.validate(full=True)
    return column


def _bytes_of(pa: Any, found: Any) -> Any:
    """The type of bytes that has the layout of a type of text."""
    names = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    return names.get(found, found)


def _record(values: tuple[bytes | None, ...], fields: Fields, row: int) -> Record:
    try:
        if len(values) == 1 and values[0] is not None and len(values[0]) > jsonl.GIANT_BYTES:
            stream = io.BytesIO(values[0])
            first = stream.read(jsonl.PIECE_BYTES)
            return Record(jsonl.stream_text(stream, first), None, row, row)
        texts = {
            name: None if value is None else jsonl.decode(value)
            for name, value in zip(fields.names, values, strict=True)
        }
        return Record(jsonl.validate_text(jsonl.join_text_fields(texts, fields)), None, row, row)
    except BadRecord as exc:
        return Record(None, exc, row, row)


class _Source:
    """An open file of either format; Arrow's is a file with a footer or a stream."""

    def __init__(self, path: str, format: str) -> None:
        self._path = path
        self._parquet = format == PARQUET

    def __enter__(self) -> _Source:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._file = pa.OSFile(self._path)
        if self._parquet:
            self._reader = pq.ParquetFile(self._file, page_checksum_verification=True)
            self.schema = self._reader.schema_arrow
            return self
        try:
            self._reader = pa.ipc.open_file(self._file)
            self._count = self._reader.num_record_batches
        except pa.ArrowInvalid:
            self._file.seek(max(self._file.size() - len(_END_OF_STREAM), 0))
            if self._file.read() != _END_OF_STREAM:
                raise pa.ArrowInvalid("the file ends before its end mark") from None
            self._file.seek(0)
            self._reader = pa.ipc.open_stream(self._file)
            self._count = None
        self.schema = self._reader.schema
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def batches(self, names: list[str]) -> Iterator[Any]:
        """Yield record batches of a bounded number of rows."""
        if self._parquet:
            for group in range(self._reader.num_row_groups):
                meta = self._reader.metadata.row_group(group)
                each = max(meta.total_byte_size // max(meta.num_rows, 1), 1)
                rows = min(max(_BATCH_BYTES // each, 1), 1 << 14)
                yield from self._reader.iter_batches(rows, row_groups=[group], columns=names)
            return
        whole = (
            self._reader if self._count is None else map(self._reader.get_batch, range(self._count))
        )
        for batch in whole:
            batch = batch.select(names)
            batch.validate()
            rows = max(batch.num_rows * _BATCH_BYTES // max(batch.nbytes, 1), 1)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


class _broken:
    """Turns what pyarrow says of damaged data into one line that names the file."""

    def __init__(self, pa: Any, path: str, format: str) -> None:
        self._pa, self._path, self._format = pa, path, format

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OSError) and exc.errno:  # the disk, not the file
            if exc.filename is None:
                raise OSError(exc.errno, f"{self._path}: {exc}") from exc
            return
        # Beside exceptions of its own it raises bare ones: OSError for sizes and sums that do not
        # fit, UnicodeDecodeError for names.
        if isinstance(exc, (self._pa.ArrowException, OSError, UnicodeDecodeError)):
            raise UserError(f"{self._path}: broken {self._format} data ({exc})") from exc
