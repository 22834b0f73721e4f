# SPDX-License-Identifier: Apache-2.0
"""The weights of a Hugging Face folder: names, types, shapes and bytes of its safetensors files.

Only headers are read to open a folder, and the safetensors library checks every file by its header
then. Bytes are read with ``pread`` into the caller's memory: a page of a mapped file counts as
memory used, and a file that shrinks while mapped ends the process instead of raising an error.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_cream.errors import UserError
from megatron_cream.json_values import read_object, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the types that weights may have."""


@dataclass(frozen=True)
class StoredTensor:
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


class HfWeights:
    """Tensors of all safetensors files of a folder.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        UserError: a file that is cut off or does not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _open_folder(folder)
        self._files: dict[Path, int] = {}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows ``[start, stop)`` of a tensor into uint8 ``out`` of exactly their size.

        Raises:
            UserError: the file ends before them.
        """
        tensor = self.tensors[name]
        offset = tensor.offset + start * tensor.row_bytes
        if tensor.path not in self._files:
            self._files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
        read_exactly(self._files[tensor.path], offset, out, tensor.path)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def read_exactly(descriptor: int, offset: int, out: np.ndarray, path: Path) -> None:
    """Fill uint8 ``out`` from a file at ``offset``.

    Raises:
        UserError: the file ends before that.
    """
    view = memoryview(out)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{path} ends at byte {offset + done}: it is cut off")
        done += count


def _open_folder(folder: Path) -> dict[str, StoredTensor]:
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


def _open_file(path: Path) -> dict[str, StoredTensor]:
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
    header, start = _read_header(path)
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a whole file, and where its data starts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length
