# SPDX-License-Identifier: Apache-2.0
"""Read, check and write the index of a Megatron indexed dataset, without importing megatron.

Megatron maps whatever it finds; a truncated file shows up as a crash, or as zeros in the loss,
some thousand steps later. Reading sizes takes milliseconds. Its own writer keeps a Python integer
for every document, this one an array.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


@dataclass(frozen=True)
class DatasetIndex:
    """What an ``.idx`` file says, and the ``.bin`` beside it was checked to hold.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: numpy dtype of a token.
        lengths: int32 ``[documents]``, tokens in each.
        pointers: int64 ``[documents]``, byte offset of each in the ``.bin`` file.
        documents: int64, in which of them a document begins, and their number at the end: other
            than 0, 1, 2 ... where documents were split.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray = field(repr=False)
    pointers: np.ndarray = field(repr=False)
    documents: np.ndarray = field(repr=False)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron's builder takes for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(
    path: str | os.PathLike[str],
    dtype: np.dtype,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    sequences: int,
    documents: int,
) -> None:
    """Write an ``.idx`` file, the bytes of Megatron's own builder, a block at a time.

    Args:
        path: the file.
        dtype: of a token.
        blocks: of documents: int32 ``[sequences]``, tokens in each, and int64 ``[documents]``, how
            many sequences each document has.
        sequences, documents: in all blocks.
    """
    code = next(code for code, known in _DTYPES.items() if dtype == known)
    header = _HEADER.pack(_MAGIC, 1, code, sequences, documents + 1)
    at = [len(header), len(header) + 4 * sequences, len(header) + 12 * sequences]
    byte = sequence = 0
    with open(path, "wb") as file:
        file.write(header)
        file.seek(at[2])
        file.write(bytes(8))  # the first document begins at sequence 0
        at[2] += 8
        for lengths, counts in blocks:
            sizes = lengths.astype(np.int64) * dtype.itemsize
            pointers = byte + np.cumsum(sizes) - sizes
            ends = sequence + np.cumsum(counts, dtype=np.int64)
            byte += int(sizes.sum())
            sequence += len(lengths)
            columns = (lengths.astype("<i4"), pointers.astype("<i8"), ends.astype("<i8"))
            for i, column in enumerate(columns):
                file.seek(at[i])
                file.write(column.tobytes())
                at[i] += column.nbytes


def read_index(prefix: str | os.PathLike[str], *, empty: bool = False) -> DatasetIndex:
    """Return the index of the dataset at ``prefix`` after checking both files' sizes.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        empty: whether a dataset of no documents is fine, as a shard of a small job may be.

    Raises:
        FileNotFoundError: ``.idx`` or ``.bin`` is missing.
        UserError: either is not of this format, or shorter than the index says.
    """
    prefix = os.fspath(prefix)
    idx, bin_path = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx, bin_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset {prefix}: there is no {path}; --data-path takes the path without .bin "
                "and .idx, as tools/preprocess_data.py --output-prefix wrote it"
            )
    size = idx.stat().st_size
    with idx.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, version, code, sequences, documents = _parse_header(idx, header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(f"{idx} is not a Megatron index (magic {magic!r}, version {version})")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise UserError(f"{idx} is truncated: it has {size} bytes and needs {expected}")
    buffer = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths = buffer[_HEADER.size : _HEADER.size + 4 * sequences].view("<i4")
    at = _HEADER.size + 4 * sequences
    pointers = buffer[at : at + 8 * sequences].view("<i8")
    borders = buffer[at + 8 * sequences : expected].view("<i8")
    dtype = np.dtype(_DTYPES[code])
    if len(lengths) or not empty:
        _check_bin(bin_path, dtype, lengths, pointers)
    return DatasetIndex(prefix, dtype, lengths, pointers, borders)


def read_metadata(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what tools/preprocess_data.py wrote beside the dataset, or None for another tool's."""
    path = Path(os.fspath(prefix) + ".json")
    return json.loads(path.read_text()) if path.is_file() else None


def _parse_header(idx: Path, header: bytes) -> tuple[Any, ...]:
    if len(header) < _HEADER.size:
        raise UserError(f"{idx} is truncated: it ends inside its header")
    return _HEADER.unpack(header)


def _check_bin(path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray) -> None:
    if not len(lengths):
        raise UserError(f"{path} holds no documents")
    expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    size = path.stat().st_size
    if size < expected:
        raise UserError(f"{path} is truncated: it has {size} bytes and its index needs {expected}")
