# SPDX-License-Identifier: Apache-2.0
"""Takes Hugging Face tensors out of the tensors of a Megatron checkpoint, block by block."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch

from megatron_cream.checkpoint.file_reader import read_ahead
from megatron_cream.checkpoint.hf_weights import TensorPlan
from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors
from megatron_cream.checkpoint.weight_map import WeightRow, rows_of_part
from megatron_cream.errors import UserError

BLOCK_BYTES = 64 << 20
"""Most bytes that are read before they are written; two blocks are in memory."""


@dataclass(frozen=True)
class ExtractedTensor:
    """A Hugging Face tensor and where it comes from.

    Attributes:
        key: Megatron tensor, and ``leading``, its index along the first axes.
        row_bytes: bytes of a row as stored.
        rows: the rows it is made of, in order.
    """

    plan: TensorPlan
    key: str
    leading: tuple[int, ...]
    row_bytes: int
    rows: list[range]

    def blocks(self) -> Iterator[list[range]]:
        """Yield its rows in blocks of at most BLOCK_BYTES, or of one row."""
        room = most = max(1, BLOCK_BYTES // self.row_bytes)
        block: list[range] = []
        for rows in self.rows:
            while rows:
                block.append(rows[:room])
                rows = rows[room:]
                room -= len(block[-1])
                if not room:
                    yield block
                    block, room = [], most
        if block:
            yield block


def plan_tensors(
    stored: TorchDistTensors, shape: ModelShape, dtype: torch.dtype | None
) -> Iterator[ExtractedTensor]:
    """Yield all tensors of a model, in the order in which they are written.

    Args:
        dtype: type to write; None for the one each is stored in.

    Raises:
        UserError: the checkpoint lacks a tensor, or has it in another shape than the model's.
    """
    for row, place in shape.places():
        shapes = [shape.part_shape(part) for part in row.parts]
        part_rows = [size[0] for size in shapes]
        key, leading = _locate(stored, shape, row, place)
        _validate_shape(stored, shape, row, key, (sum(part_rows), *shapes[0][1:]))
        saved = stored.dtype(key)
        for number, part in enumerate(row.parts):
            yield ExtractedTensor(
                plan=TensorPlan(part.at(place), dtype or saved, shapes[number]),
                key=key,
                leading=leading,
                row_bytes=prod(shapes[number][1:]) * saved.itemsize,
                rows=rows_of_part(row, part_rows, shape.groups, number),
            )


def _locate(
    stored: TorchDistTensors, shape: ModelShape, row: WeightRow, place: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """Return the key of a tensor and its index: Megatron may also store a tensor for each layer."""
    for name in filter(None, (row.key, row.alias)):
        if name in stored:
            return name, place
        of_layer = name.replace("decoder.layers.", f"decoder.layers.{place[0]}.") if place else name
        if of_layer in stored:
            return of_layer, place[1:]
    raise UserError(f"checkpoint {stored.folder} lacks {row.key}: a {shape.architecture} has it")


def _validate_shape(
    stored: TorchDistTensors, shape: ModelShape, row: WeightRow, key: str, size: tuple[int, ...]
) -> None:
    layers = shape.leading(row) if key in (row.key, row.alias) else shape.leading(row)[1:]
    wanted, found = (*layers, *size), stored.shape(key)
    if row.parts[0].shape[0] == "v":  # padded, for tensor parallelism
        wanted = (max(wanted[0], found[0]), *wanted[1:])
    if found != wanted:
        raise UserError(
            f"checkpoint {stored.folder}: {key} has shape {list(found)}, by its arguments it must "
            f"have {list(wanted)}"
        )


def read_tensors(
    stored: TorchDistTensors, tensors: list[ExtractedTensor]
) -> Generator[np.ndarray, None, None]:
    """Yield the bytes of all tensors, block by block and in order, reading one block ahead."""
    largest = max(
        max(t.row_bytes, min(BLOCK_BYTES, t.row_bytes * t.plan.shape[0])) for t in tensors
    )
    blocks = ((tensor, block) for tensor in tensors for block in tensor.blocks())
    return read_ahead((partial(_read, stored, *one) for one in blocks), largest)


def _read(
    stored: TorchDistTensors, tensor: ExtractedTensor, block: list[range], memory: np.ndarray
) -> np.ndarray:
    out = memory[: sum(map(len, block)) * tensor.row_bytes].reshape(-1, tensor.row_bytes)
    filled = 0
    for rows in block:
        target = out[filled : filled + len(rows)]
        stored.read_rows(tensor.key, tensor.leading, rows.start, rows.stop, target)
        filled += len(rows)
    saved = stored.dtype(tensor.key)
    if saved == tensor.plan.dtype:
        return out.reshape(-1)
    values = torch.frombuffer(out.reshape(-1), dtype=saved).to(tensor.plan.dtype)
    return values.view(torch.uint8).numpy()
