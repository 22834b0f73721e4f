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
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_cream.checkpoint.weights import read_exactly
from megatron_cream.errors import UserError

_ENTRY = "/data/0"
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class StoredTensors:
    """Tensors of one checkpoint folder.

    Raises:
        FileNotFoundError: a file that the checkpoint names is missing.
        UserError: the folder holds no checkpoint of this format, or a file that is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        # Without the index that torch numbers a rank's chunks by.
        self._places = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
        }
        self._files: dict[str, int] = {}
        self._starts: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
        self._check_files()

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
        info = self._places[key, tuple(chunk.offsets)]
        path = info.relative_path
        section = _Section(self._descriptor(path), info.offset, info.length)
        try:
            with zipfile.ZipFile(section) as archive:
                (entry,) = [i for i in archive.infolist() if i.filename.endswith(_ENTRY)]
            # A chunk with other strides would have its bytes in another order.
            tensor = torch.load(section.rewound(), map_location="meta", weights_only=True)
        except (zipfile.BadZipFile, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.folder / path}: {key} cannot be read ({error})") from None
        stored = tensor.shape == chunk.sizes and tensor.dtype == self.dtype(key)
        plain = entry.file_size == tensor.nbytes and entry.compress_type == zipfile.ZIP_STORED
        if info.transform_descriptors or not (stored and plain and tensor.is_contiguous()):
            raise UserError(f"{self.folder / path}: {key} is stored in a way that is not served")
        header = section.at(entry.header_offset, _LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return path, info.offset + entry.header_offset + _LOCAL_HEADER + names

    def _descriptor(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = os.open(self.folder / path, os.O_RDONLY)
        return self._files[path]

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._places.values():
            path = info.relative_path
            ends[path] = max(ends.get(path, 0), info.offset + info.length)
        for path, end in ends.items():
            file = self.folder / path
            if not file.is_file():
                raise FileNotFoundError(f"checkpoint {self.folder} lacks its file {path}")
            if file.stat().st_size < end:
                raise UserError(
                    f"{file} has {file.stat().st_size} bytes, .metadata says {end}: it is cut off"
                )

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _read_metadata(folder: Path) -> Metadata:
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(
            f"{folder} has no .metadata: it must be one iteration of a torch_dist checkpoint"
        )
    try:
        return FileSystemReader(folder).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(f"{folder / '.metadata'} cannot be read: {error}") from None


class _Section(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        done = os.preadv(self._descriptor, [view[:count]], self._offset + self._position)
        self._position += done
        return done

    def at(self, position: int, count: int) -> bytes:
        """Return ``count`` bytes from ``position``."""
        self.seek(position)
        return self.read(count)

    def rewound(self) -> _Section:
        """Return this section at its start."""
        self.seek(0)
        return self
