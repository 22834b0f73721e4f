# SPDX-License-Identifier: Apache-2.0
"""Reads tensors of a ``torch_dist`` checkpoint one by one, whatever layout saved it.

A global tensor lies in chunks over the files of all ranks that saved it. A chunk is a record of
``torch.save``: a zip archive whose entry ``.../data/0`` is the bytes, uncompressed. They are read
from there straight into place; torch's own reader loads whole chunks and copies parts of them.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_cream.checkpoint.safetensors_reader import read_exactly
from megatron_cream.checkpoint.section import Section
from megatron_cream.checkpoint.torch_dist_table import Table, read_table
from megatron_cream.checkpoint.unpickling import damage_of
from megatron_cream.errors import UserError

_ENTRY = "/data/0"
_LOCAL_MAGIC = b"PK\3\4"
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class StoredTensors:
    """Tensors of one checkpoint folder.

    Raises:
        FileNotFoundError: a file that the checkpoint names is missing.
        UserError: the folder holds no checkpoint of this format, or a file that is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = read_table(folder)
        self._tensors, self._records = table.tensors, table.records
        for problem in lacking_files(table):
            raise problem
        self._files: dict[str, int] = {}
        self._starts: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a global tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a global tensor."""
        return self._tensors[key].properties.dtype

    def read_rows(
        self, key: str, leading: Sequence[int], start: int, stop: int, out: np.ndarray
    ) -> None:
        """Read rows ``[start, stop)`` of ``tensor[leading]`` into uint8 ``[rows, row bytes]``.

        Args:
            leading: an index along each of the first axes, () for the tensor itself.

        Raises:
            UserError: a file is cut off, or the chunks do not cover what is asked for.
        """
        covered = 0
        for chunk in self._tensors[key].chunks:
            inner = [i - o for i, o in zip(leading, chunk.offsets, strict=False)]
            if all(0 <= i < n for i, n in zip(inner, chunk.sizes, strict=False)):
                first = chunk.offsets[len(inner)]
                begin, end = max(start, first), min(stop, first + chunk.sizes[len(inner)])
                if begin < end:
                    target = out[begin - start : end - start]
                    covered += self._read_chunk(key, chunk, inner, begin - first, target)
        if covered != out.size:
            raise UserError(
                f"checkpoint {self.folder}: {key} has {covered} bytes where {out.size} are needed"
            )

    def _read_chunk(
        self,
        key: str,
        chunk: ChunkStorageMetadata,
        inner: list[int],
        first: int,
        target: np.ndarray,
    ) -> int:
        """Read rows of a chunk, from its row ``first`` on, into their place; return their bytes."""
        size, offset = chunk.sizes[len(inner) :], chunk.offsets[len(inner) :]
        row_bytes = math.prod(size[1:]) * self.dtype(key).itemsize
        before = int(np.ravel_multi_index(inner, chunk.sizes[: len(inner)])) if inner else 0
        path, start = self._data(key, chunk)
        start += (before * size[0] + first) * row_bytes
        if row_bytes == target.shape[1]:
            read_exactly(self._descriptor(path), start, target.reshape(-1), self.folder / path)
            return target.size
        box = np.empty((target.shape[0], row_bytes), np.uint8)
        read_exactly(self._descriptor(path), start, box.reshape(-1), self.folder / path)
        column = offset[1] * self.dtype(key).itemsize
        target[:, column : column + row_bytes] = box
        return box.size

    def _data(self, key: str, chunk: ChunkStorageMetadata) -> tuple[str, int]:
        place = key, tuple(chunk.offsets)
        if place not in self._starts:
            self._starts[place] = self._find_data(key, chunk)
        return self._starts[place]

    def _find_data(self, key: str, chunk: ChunkStorageMetadata) -> tuple[str, int]:
        """Return the file of a chunk, and where in it its bytes start."""
        record = self._records[key, tuple(chunk.offsets)]
        path = self.folder / record.file
        section = Section(self._descriptor(record.file), record.start, record.length)
        if record.transformed:
            raise UserError(f"{path}: {key} is stored in a way that is not served")
        start = data_start(section, chunk, self.dtype(key), f"{path}: {key}")
        return record.file, record.start + start

    def _descriptor(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = os.open(self.folder / path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def data_start(
    section: Section, chunk: ChunkStorageMetadata, dtype: torch.dtype, place: str
) -> int:
    """Return where in the record of a chunk its bytes start.

    Raises:
        UserError: the record is damaged, or holds something else than this chunk, uncompressed and
            in order.
    """
    with damage_of(place):
        with zipfile.ZipFile(section) as archive:
            (entry,) = [i for i in archive.infolist() if i.filename.endswith(_ENTRY)]
        # A chunk with other strides would have its bytes in another order.
        tensor = torch.load(section.rewound(), map_location="meta", weights_only=True)
    stored = isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype) == (
        chunk.sizes,
        dtype,
    )
    plain = entry.compress_type == zipfile.ZIP_STORED
    if not (stored and plain and entry.file_size == tensor.nbytes and tensor.is_contiguous()):
        raise UserError(f"{place} is stored in a way that is not served")
    header = section.at(entry.header_offset, _LOCAL_HEADER)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + names
    if header[:4] != _LOCAL_MAGIC or start + tensor.nbytes > section.seek(0, io.SEEK_END):
        raise UserError(f"{place} is damaged and cannot be read (its bytes are not in the record)")
    return start


def lacking_files(table: Table) -> Iterator[OSError | UserError]:
    """Yield an error for each file of a checkpoint that is missing or shorter than it must be."""
    for name, end in sorted(table.ends().items()):
        file = table.folder / name
        if not file.is_file():
            yield FileNotFoundError(f"checkpoint {table.folder} lacks its file {name}")
        elif (size := file.stat().st_size) < end:
            yield UserError(f"{file} has {size} bytes, .metadata says {end}: it is cut off")
