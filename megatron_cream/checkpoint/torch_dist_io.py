# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the tensors of a checkpoint in the torch_dist format."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_cream.checkpoint import checksums
from megatron_cream.checkpoint.hf_weights import read_exactly
from megatron_cream.checkpoint.torch_dist_table import CheckpointTable, read_table
from megatron_cream.checkpoint.unpickling import name_damaged
from megatron_cream.errors import UserError


class FileSection(io.RawIOBase):
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

    def rewound(self) -> FileSection:
        """Return this section at its start."""
        self.seek(0)
        return self


_ENTRY = "/data/0"
_LOCAL_MAGIC = b"PK\3\4"
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class TorchDistTensors:
    """Tensors of one checkpoint folder.

    Raises:
        FileNotFoundError: a file that the checkpoint names is missing.
        UserError: the folder holds no checkpoint of this format, or a file that is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = read_table(folder)
        self._tensors, self._records = table.tensors, table.records
        for problem in find_missing_files(table):
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
        section = FileSection(self._descriptor(record.file), record.start, record.length)
        if record.transformed:
            raise UserError(f"{path}: {key} is stored in a way that is not served")
        start = find_data(section, chunk, self.dtype(key), f"{path}: {key}")
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


def find_data(
    section: FileSection, chunk: ChunkStorageMetadata, dtype: torch.dtype, place: str
) -> int:
    """Return where in the record of a chunk its bytes start.

    Raises:
        UserError: the record is damaged, or holds something else than this chunk, uncompressed and
            in order.
    """
    with name_damaged(place):
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


def find_missing_files(table: CheckpointTable) -> Iterator[OSError | UserError]:
    """Yield an error for each file of a checkpoint that is missing or shorter than it must be."""
    for name, end in sorted(table.ends().items()):
        file = table.folder / name
        if not file.is_file():
            yield FileNotFoundError(f"checkpoint {table.folder} lacks its file {name}")
        elif (size := file.stat().st_size) < end:
            yield UserError(f"{file} has {size} bytes, .metadata says {end}: it is cut off")


_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

_FILE_BYTES = 5_000_000_000  # several files, so that several readers find work


@dataclass(frozen=True)
class TensorChunk:
    """A box of a global tensor.

    Attributes:
        key: name of the global tensor.
        shape: of the global tensor.
        offset: first element of the box along every axis.
        size: of the box along every axis.
        fill: puts its bytes into uint8 memory of exactly that many.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    fill: Callable[[np.ndarray], None]

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return int(np.prod(self.size, dtype=np.int64)) * self.dtype.itemsize


def write_torch_dist(
    folder: Path,
    chunks: list[TensorChunk],
    objects: dict[str, Any],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a checkpoint that Megatron's loader takes at any layout.

    Args:
        folder: where ``.metadata``, ``metadata.json`` and the data go.
        chunks: all tensors, together covering each global tensor once.
        objects: Megatron's name of an object with its place, for instance
            ``common_state/shard_0_1``, to what ``torch.save`` can save.
        on_bytes: called with the bytes of every chunk that is about to be written.

    Raises:
        OSError: the disk is full, or fails.
    """
    # Nothing copied ahead: one piece at a time, in the order of the plan, also where a GPU is.
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan(_plans(chunks, objects))
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    by_index = {(chunk.key, chunk.offset): chunk for chunk in chunks}
    results = []
    # Of each file while the next is written: it is still in memory.
    sums: dict[str, Future[checksums.FileChecksum]] = {}
    with _without_checksums(), ThreadPoolExecutor(1) as reader:
        for number, plan in enumerate(plans):
            wanted = [item for item in plan.items if item.type is WriteItemType.SHARD]
            order = [by_index[item.index.fqn, tuple(item.index.offset)] for item in wanted]
            with _ChunkReader(order, objects, on_bytes) as source:
                results.append(writer.write_data(plan, source).wait())
            for path in folder.glob(f"__{number}_*"):
                sums[path.name] = reader.submit(checksums.checksum, path)
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    small = {name: checksums.checksum(folder / name) for name in (".metadata", "metadata.json")}
    checksums.write_sums(folder, 0, small | {name: sum_.result() for name, sum_ in sums.items()})


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out checksums inside the records: they halve the speed, and files have their own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _plans(chunks: list[TensorChunk], objects: dict[str, Any]) -> list[SavePlan]:
    items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    plans, filled = [items], 0
    for chunk in chunks:
        if filled + chunk.nbytes > _FILE_BYTES:
            plans.append([])
            filled = 0
        plans[-1].append(_write_item(chunk))
        filled += chunk.nbytes
    return [SavePlan(plan) for plan in plans]


def _write_item(chunk: TensorChunk) -> WriteItem:
    offset, size = torch.Size(chunk.offset), torch.Size(chunk.size)
    return WriteItem(
        MetadataIndex(chunk.key, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offset, size),
            TensorProperties(dtype=chunk.dtype),
            torch.Size(chunk.shape),
        ),
    )


class _ChunkReader:
    """Hands the writer one piece after the other, with the next one being read meanwhile.

    Of a ``SavePlanner`` it has what the writer calls; the plans are made before.
    """

    def __init__(
        self, order: list[TensorChunk], objects: dict[str, Any], on_bytes: Callable[[int], None]
    ) -> None:
        self._order = order
        self._objects = objects
        self._on_bytes = on_bytes
        largest = max((chunk.nbytes for chunk in order), default=0)
        self._buffers = [np.empty(largest, np.uint8) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1)
        self._next = 0
        self._ahead: Future[torch.Tensor] | None = self._read_ahead()

    def __enter__(self) -> _ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(wait=True)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)
            return data
        chunk = self._order[self._next]
        if (chunk.key, chunk.offset) != (write_item.index.fqn, tuple(write_item.index.offset)):
            raise RuntimeError(f"torch asked for {write_item.index} before {chunk.key}")
        tensor = self._ahead.result()
        self._next += 1
        self._ahead = self._read_ahead()
        self._on_bytes(chunk.nbytes)
        return tensor

    def _read_ahead(self) -> Future[torch.Tensor] | None:
        if self._next == len(self._order):
            return None
        # The writer has written the tensor before the last one when it asks for the next.
        return self._reader.submit(self._read, self._next)

    def _read(self, number: int) -> torch.Tensor:
        chunk = self._order[number]
        memory = self._buffers[number % 2][: chunk.nbytes]
        chunk.fill(memory)
        return torch.frombuffer(memory, dtype=chunk.dtype).view(chunk.size)
