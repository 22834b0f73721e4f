# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint in Megatron's ``torch_dist`` format without building the model.

The format is torch.distributed.checkpoint's, with Megatron's ``metadata.json`` beside it. Its own
writer asks for one piece at a time, so that a model of any size is written from the memory of one
piece; the next piece is read while one is written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
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

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

_FILE_BYTES = 5_000_000_000  # several files, so that several readers find work


@dataclass(frozen=True)
class Chunk:
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
    chunks: list[Chunk],
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
    sums: dict[str, Future[checksums.Sum]] = {}
    with _without_checksums(), ThreadPoolExecutor(1) as reader:
        for number, plan in enumerate(plans):
            wanted = [item for item in plan.items if item.type is WriteItemType.SHARD]
            order = [by_index[item.index.fqn, tuple(item.index.offset)] for item in wanted]
            with _Source(order, objects, on_bytes) as source:
                results.append(writer.write_data(plan, source).wait())
            for path in folder.glob(f"__{number}_*"):
                sums[path.name] = reader.submit(checksums.checksum, path)
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
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


def _plans(chunks: list[Chunk], objects: dict[str, Any]) -> list[SavePlan]:
    items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    plans, filled = [items], 0
    for chunk in chunks:
        if filled + chunk.nbytes > _FILE_BYTES:
            plans.append([])
            filled = 0
        plans[-1].append(_write_item(chunk))
        filled += chunk.nbytes
    return [SavePlan(plan) for plan in plans]


def _write_item(chunk: Chunk) -> WriteItem:
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


class _Source:
    """Hands the writer one piece after the other, with the next one being read meanwhile.

    Of a ``SavePlanner`` it has what the writer calls; the plans are made before.
    """

    def __init__(
        self, order: list[Chunk], objects: dict[str, Any], on_bytes: Callable[[int], None]
    ) -> None:
        self._order = order
        self._objects = objects
        self._on_bytes = on_bytes
        largest = max((chunk.nbytes for chunk in order), default=0)
        self._buffers = [np.empty(largest, np.uint8) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1)
        self._next = 0
        self._ahead: Future[torch.Tensor] | None = self._read_ahead()

    def __enter__(self) -> _Source:
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
