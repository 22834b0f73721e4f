# SPDX-License-Identifier: Apache-2.0
"""Reads what needs a library of its own: zstd streams, columns of Parquet and Arrow files.

Damage in a file is an error that names it, whatever the library makes of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError

PARQUET, ARROW = "parquet", "arrow"
_PACKED_BYTES = 16 << 10  # of zstd at a time: they are expanded whole before any is handed out
_TABLE_BATCH_BYTES = 8 << 20
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_Batches = Callable[[list[str]], Iterator[Any]]
"""Takes names of columns and yields record batches of a bounded number of rows."""


def read_rows(
    path: str, format: str, names: Sequence[str], offset: int
) -> Iterator[tuple[int, tuple[bytes | None, ...]]]:
    """Yield the bytes under ``names`` of each row behind the first ``offset``, and its number.

    Raises:
        UserError: the file is damaged, or has no such column of text.
        OSError: it cannot be read.
    """
    row = 0
    with _open_table(path, format, names) as (pa, batches):
        for batch in batches(list(names)):
            count = batch.num_rows
            if row + count > offset:
                skip = max(offset - row, 0)
                columns = [_as_bytes(pa, batch.column(name)) for name in names]
                lists = [column.cast(pa.large_binary()).to_pylist()[skip:] for column in columns]
                yield from enumerate(zip(*lists, strict=True), start=row + skip + 1)
            row += count


def validate_columns(path: str, format: str, names: Sequence[str]) -> None:
    """Check that a file is whole and has a column of text under each of ``names``.

    Raises:
        UserError: naming the file and what is wrong.
    """
    with _open_table(path, format, names):
        pass


@contextmanager
def _open_table(path: str, format: str, names: Sequence[str]) -> Iterator[tuple[Any, _Batches]]:
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
            _validate_schema(pa, path, opened[0], names)
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


def _validate_schema(pa: Any, path: str, schema: Any, names: Sequence[str]) -> None:
    text = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    for name in names:
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


def import_zstandard(path: Path, flag: str = "--input") -> Any:
    """Return the package that expands ``path``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as exc:
        raise UserError(
            f"{flag} {path}: needs the zstandard package, run `pip install zstandard`"
        ) from exc
    return zstandard


class BrokenStream(Exception):
    """The compressed bytes are damaged or end too early."""


def expand_zstd(file: io.RawIOBase, zstandard: Any) -> Iterator[bytes]:
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
        raise BrokenStream(str(exc)) from exc
    if frame is not None:
        raise BrokenStream("the file ends inside a zstd frame")


class ChunkedFile(io.RawIOBase):
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
