# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files tensor by tensor.

The safetensors library serialises a whole file at once, so that its memory grows with the size of
a shard. Here the header is written first, from names, types and shapes alone, and bytes follow as
they come.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cream.checkpoint.safetensors_reader import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def cut_into_shards(tensors: list[TensorPlan], most_bytes: int) -> list[list[TensorPlan]]:
    """Cut a list of tensors, in its order, into shards of at most ``most_bytes``.

    A tensor that is larger gets a shard of its own.
    """
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


class ShardWriter:
    """Writes planned tensors, in their order, into the files that transformers looks for.

    Args:
        folder: where the files go.
        tensors: all tensors, in the order in which their bytes will be written.
        most_bytes: size of a file that is not exceeded, headers not counted.
    """

    def __init__(self, folder: Path, tensors: list[TensorPlan], most_bytes: int) -> None:
        self.folder = folder
        self.shards = cut_into_shards(tensors, most_bytes)

    @property
    def names(self) -> list[str]:
        """File names of the shards."""
        if len(self.shards) == 1:
            return [SINGLE]
        total = len(self.shards)
        return [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]

    @contextmanager
    def shard(self, number: int) -> Iterator[_Shard]:
        """Open one shard for writing; on leaving it must be full, and is on the disk."""
        path = self.folder / self.names[number]
        with path.open("wb", buffering=0) as file:
            shard = _Shard(file.fileno(), sum(t.nbytes for t in self.shards[number]))
            _write(file.fileno(), memoryview(_header(self.shards[number])))
            yield shard
            if shard.left:
                raise RuntimeError(f"{path}: {shard.left} bytes of its tensors were not written")
            os.fsync(file.fileno())

    def write_index(self) -> None:
        """Write which shard has which tensor; nothing where there is one shard."""
        if len(self.shards) == 1:
            return
        files = zip(self.names, self.shards, strict=True)
        weight_map = {t.name: name for name, shard in files for t in shard}
        total = sum(t.nbytes for shard in self.shards for t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class _Shard:
    """An open file: takes the bytes of its tensors one after the other."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.left = size

    def write(self, data: np.ndarray) -> None:
        """Append contiguous uint8 ``data``."""
        _write(self._descriptor, memoryview(data))
        self.left -= data.nbytes


def _write(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]


def _header(tensors: list[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    return struct.pack("<Q", len(text)) + text
