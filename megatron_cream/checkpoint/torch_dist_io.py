# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the tensors of a checkpoint in torch's distributed format, ``torch_dist``.

A global tensor lies in chunks over the files of all ranks that saved it. A chunk is a record of
``torch.save``: a zip archive whose entry ``.../data/0`` is the bytes, uncompressed. They are read
from there straight into place; torch's own reader loads whole chunks and copies parts of them.

torch's own writer, which asks for one chunk at a time, writes a model of any size from the memory
of two chunks, without building it: the next one is read while one is written.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_cream.checkpoint.iterations import FileChecksum, checksum, write_checksums_of
from megatron_cream.checkpoint.torch_dist_table import RecordKey, read_table
from megatron_cream.errors import UserError, name_damaged


class FileReader:
    """Opens each file when it is first read from, and keeps it open until ``close``."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def read_exactly(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill contiguous uint8 ``out`` from a file at ``offset``.

        Raises:
            UserError: the file ends before that.
        """
        view = memoryview(out).cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{path} ends at byte {offset + done}: it is cut off")
            done += count

    def open_section(self, path: Path, start: int, length: int) -> io.BufferedReader:
        """Return a section of a file as a file of its own, as zipfile and torch read them."""
        return io.BufferedReader(_FileSection(self._descriptor(path), start, length))

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class _FileSection(io.RawIOBase):
    """A section of an open file; ``pread`` leaves the position of the file itself alone."""

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

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        done = os.preadv(self._descriptor, [view[:count]], self._offset + self._position)
        self._position += done
        return done


def read_ahead[Read](
    reads: Iterable[Callable[[np.ndarray], Read]], largest: int
) -> Generator[Read, None, None]:
    """Yield what each call returns, while the next one is running in a thread.

    Args:
        reads: each fills the begin of uint8 memory; what it returns is valid until the next one is
            asked for.
        largest: bytes of the memory; there are two of it.
    """
    buffers = [np.empty(largest, np.uint8) for _ in range(2)]
    ahead: Future[Read] | None = None
    with ThreadPoolExecutor(1) as reader:
        for number, read in enumerate(reads):
            following = reader.submit(read, buffers[number % 2])
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


_ENTRY = "/data/0"
_LOCAL_MAGIC = b"PK\3\4"
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class TorchDistTensors(FileReader):
    """Tensors of one checkpoint folder.

    Raises:
        FileNotFoundError: a file that the checkpoint names is missing.
        UserError: the folder holds no checkpoint of this format, or a file that is cut off.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        table = read_table(folder)
        self._tensors, self._records = table.tensors, table.records
        for problem in table.missing_files():
            raise problem
        self._starts: dict[RecordKey, tuple[Path, int]] = {}

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
            self.read_exactly(path, start, target)
            return target.size
        box = np.empty((target.shape[0], row_bytes), np.uint8)
        self.read_exactly(path, start, box)
        column = offset[1] * self.dtype(key).itemsize
        target[:, column : column + row_bytes] = box
        return box.size

    def _data(self, key: str, chunk: ChunkStorageMetadata) -> tuple[Path, int]:
        """Return the file of a chunk, and where in it its bytes start."""
        place = key, tuple(chunk.offsets)
        if place not in self._starts:
            record = self._records[place]
            path = self.folder / record.file
            if record.transformed:
                raise UserError(f"{path}: {key} is stored in a way that is not supported")
            section = self.open_section(path, record.start, record.length)
            start = find_data(section, chunk, self.dtype(key), f"{path}: {key}")
            self._starts[place] = path, record.start + start
        return self._starts[place]


def find_data(
    section: io.BufferedReader, chunk: ChunkStorageMetadata, dtype: torch.dtype, place: str
) -> int:
    """Return where in the record of a chunk its bytes start.

    Raises:
        UserError: the record is damaged, or holds something else than this chunk, uncompressed and
            in order.
    """
    with name_damaged(place):
        with zipfile.ZipFile(section) as archive:
            (entry,) = [i for i in archive.infolist() if i.filename.endswith(_ENTRY)]
        section.seek(0)
        # A chunk with other strides would have its bytes in another order.
        tensor = torch.load(section, map_location="meta", weights_only=True)
    same = isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype) == (chunk.sizes, dtype)
    plain = entry.compress_type == zipfile.ZIP_STORED
    if not (same and plain and entry.file_size == tensor.nbytes and tensor.is_contiguous()):
        raise UserError(f"{place} is stored in a way that is not supported")
    section.seek(entry.header_offset)
    header = section.read(_LOCAL_HEADER)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + names
    if header[:4] != _LOCAL_MAGIC or start + tensor.nbytes > section.seek(0, io.SEEK_END):
        raise UserError(f"{place} is damaged and cannot be read (its bytes are not in the record)")
    return start


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
        return math.prod(self.size) * self.dtype.itemsize

    def read(self, memory: np.ndarray) -> torch.Tensor:
        """Return the box, in the begin of uint8 ``memory``."""
        box = memory[: self.nbytes]
        self.fill(box)
        return torch.frombuffer(box, dtype=self.dtype).view(self.size)


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
    # Nothing copied ahead: one chunk at a time, in the order of the plan, also where a GPU is.
    writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan(_plans(chunks, objects))
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    by_index = {(chunk.key, chunk.offset): chunk for chunk in chunks}
    results = []
    # Of each file while the next is written: it is still in memory.
    sums: dict[str, Future[FileChecksum]] = {}
    with _without_checksums(), ThreadPoolExecutor(1) as reader:
        for number, plan in enumerate(plans):
            wanted = [item.index for item in plan.items if item.type is WriteItemType.SHARD]
            order = [by_index[index.fqn, tuple(index.offset or ())] for index in wanted]
            largest = max((chunk.nbytes for chunk in order), default=0)
            with closing(read_ahead((chunk.read for chunk in order), largest)) as tensors:
                planner = _ChunkPlanner(order, tensors, objects, on_bytes)
                results.append(writer.write_data(plan, planner).wait())
            for path in folder.glob(f"__{number}_*"):
                sums[path.name] = reader.submit(checksum, path)
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    small = {name: checksum(folder / name) for name in (".metadata", "metadata.json")}
    write_checksums_of(folder, 0, small | {name: sum_.result() for name, sum_ in sums.items()})


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
        offset, size = torch.Size(chunk.offset), torch.Size(chunk.size)
        box, kind = ChunkStorageMetadata(offset, size), TensorProperties(dtype=chunk.dtype)
        data = TensorWriteData(box, kind, torch.Size(chunk.shape))
        index = MetadataIndex(chunk.key, offset)
        plans[-1].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        filled += chunk.nbytes
    return [SavePlan(plan) for plan in plans]


class _ChunkPlanner(DefaultSavePlanner):
    """Hands torch's writer one chunk after the other; the plans are made before."""

    def __init__(
        self,
        order: list[TensorChunk],
        tensors: Iterator[torch.Tensor],
        objects: dict[str, Any],
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._order, self._tensors = iter(order), tensors
        self._objects, self._on_bytes = objects, on_bytes

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)
            return data
        chunk, index = next(self._order), write_item.index
        if (chunk.key, chunk.offset) != (index.fqn, tuple(index.offset or ())):
            raise RuntimeError(f"torch asked for {index} before {chunk.key}")
        tensor = next(self._tensors)
        self._on_bytes(chunk.nbytes)
        return tensor
