# SPDX-License-Identifier: Apache-2.0
"""Reads, validates and writes the safetensors files of a Hugging Face folder.

The safetensors library checks every file by its header. Bytes are read into the caller's memory
and written as they come: a page of a file that the library maps counts as memory used, one that
shrinks meanwhile ends the process, and the library's writer holds a whole file in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.checkpoint.torch_dist_io import FileReader
from megatron_cream.checkpoint.weight_map import IGNORED
from megatron_cream.errors import UserError, reason
from megatron_cream.options import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the types that weights may have."""

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""torch's names of them."""


@dataclass(frozen=True)
class TensorLocation:
    """Where the bytes of a tensor are.

    Attributes:
        offset: first byte, from the start of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of everything behind the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


class HfWeights(FileReader):
    """Tensors of all safetensors files of a folder.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        UserError: a file that is cut off or does not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tensors = _open_folder(folder)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows ``[start, stop)`` of a tensor into uint8 ``out`` of exactly their size.

        Raises:
            UserError: the file ends before them.
        """
        tensor = self.tensors[name]
        self.read_exactly(tensor.path, tensor.offset + start * tensor.row_bytes, out)


def _open_folder(folder: Path) -> dict[str, TensorLocation]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(
                f"{folder} has neither {SINGLE} nor {INDEX}: weights must be in safetensors files"
            )
        return _open_file(folder / SINGLE)
    weight_map = _read_index(index)
    missing = sorted({f for f in weight_map.values() if not (folder / f).is_file()})
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(set(weight_map.values()))} files that {INDEX} "
            f"names: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    files = {name: _open_file(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in files[file]:
            raise UserError(f"{folder / file} lacks {tensor}, which {INDEX} says it has")
    return {tensor: files[file][tensor] for tensor, file in weight_map.items()}


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not an index of safetensors files: it has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise UserError(
                f"{index} says that {reprlib.repr(tensor)} is in {reprlib.repr(file)}: it must be "
                "the name of a safetensors file in the same folder"
            )
    return weight_map


_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


def _open_file(path: Path) -> dict[str, TensorLocation]:
    """Return the tensors of a file that the safetensors library calls whole.

    It reads the header alone and checks all of it: types, sizes, and that the tensors follow each
    other from the first byte of data to the last one of the file.
    """
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{path} is cut off, damaged or no safetensors file: {reason(error)}"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: TensorLocation(
            path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


_COMPARED_BYTES = 64 << 20  # at a time
_LISTED = 10_000


def validate_weights(
    weights: HfWeights, shape: ModelShape, dtype: torch.dtype | None
) -> torch.dtype:
    """Compare the weights with the table of the family; return the type they have.

    Raises:
        UserError: a tensor that is missing, of another shape than config.json says, that the
            family has no place for, or of another type than the rest where ``dtype`` is None.
    """
    # A config.json may ask for billions: no more are listed than are needed to name the first.
    expected = dict(islice(_expected_shapes(shape), 2 * len(weights.tensors) + _LISTED))
    missing = sorted(expected.keys() - weights.tensors.keys())
    if missing:
        lacked = shape.tensors - (len(expected) - len(missing))
        raise UserError(
            f"{weights.folder} lacks {lacked} tensors that its config.json asks for: "
            f"{_few(missing)}"
        )
    for name, size in expected.items():
        if weights.tensors[name].shape != size:
            raise UserError(
                f"{weights.folder}: {name} has shape {list(weights.tensors[name].shape)}, by "
                f"config.json it must have {list(size)}"
            )
    stored = _validate_type(weights, list(expected), dtype)
    rest = [n for n in weights.tensors if n not in expected and not n.endswith(IGNORED)]
    if rest == ["lm_head.weight"] and shape.tied:
        _validate_tied(weights)
    elif rest:
        raise UserError(
            f"{weights.folder} has {len(rest)} tensors that {shape.architecture} has no place "
            f"for: {_few(sorted(rest))}"
        )
    return stored


def _expected_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for row, place in shape.places():
        for part in row.parts:
            yield part.at(place), shape.part_shape(part)


def _validate_type(weights: HfWeights, names: list[str], dtype: torch.dtype | None) -> torch.dtype:
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(weights.tensors[name].dtype, []).append(name)
    unknown = by_type.keys() - DTYPES.keys()
    if unknown:
        raise UserError(
            f"{weights.folder}: {by_type[min(unknown)][0]} has type {min(unknown)}: it must be one "
            f"of {tuple(DTYPES)}"
        )
    if len(by_type) > 1 and dtype is None:
        kinds = ", ".join(f"{len(n)} {kind} ({n[0]})" for kind, n in sorted(by_type.items()))
        raise UserError(
            f"{weights.folder} has tensors of several types: {kinds}; say with --dtype which one "
            "the checkpoint shall have"
        )
    return DTYPES[next(iter(by_type))]


def _validate_tied(weights: HfWeights) -> None:
    """Some checkpoints store the output layer although it is the embedding: it must be equal."""
    names = "model.embed_tokens.weight", "lm_head.weight"
    one, two = (weights.tensors[name] for name in names)
    same = (one.shape, one.dtype) == (two.shape, two.dtype)
    step = max(1, _COMPARED_BYTES // one.row_bytes)
    for start in range(0, one.shape[0] if same else 0, step):
        stop = min(start + step, one.shape[0])
        rows = np.empty((2, (stop - start) * one.row_bytes), np.uint8)
        for name, out in zip(names, rows, strict=True):
            weights.read_rows(name, start, stop, out)
        same = same and np.array_equal(rows[0], rows[1])
    if not same:
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true in config.json, but lm_head.weight "
            "differs from model.embed_tokens.weight"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


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
        return math.prod(self.shape) * self.dtype.itemsize


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


def write_shards(
    folder: Path,
    tensors: list[TensorPlan],
    most_bytes: int,
    blocks: Iterator[np.ndarray],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Write planned tensors, in their order, into the files that transformers looks for.

    Args:
        folder: where the files go.
        tensors: in the order in which their bytes come.
        most_bytes: size of a file that is not exceeded, headers not counted.
        blocks: contiguous uint8 memory; each is used before the next one is asked for, and none
            has bytes of two tensors.
        on_bytes: called with the bytes of each block that was written.

    Raises:
        RuntimeError: there are fewer bytes than planned.
    """
    shards = cut_into_shards(tensors, most_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        left = sum(tensor.nbytes for tensor in shard)
        with (folder / name).open("wb", buffering=0) as file:
            _write(file.fileno(), memoryview(_header(shard)))
            while left > 0 and (block := next(blocks, None)) is not None:
                _write(file.fileno(), memoryview(block))
                left -= block.nbytes
                on_bytes(block.nbytes)
            if left:
                raise RuntimeError(f"{folder / name}: {left} bytes of its tensors were not written")
            os.fsync(file.fileno())
    if len(shards) > 1:
        where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
