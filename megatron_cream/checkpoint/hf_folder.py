# SPDX-License-Identifier: Apache-2.0
"""Finds and reads a Hugging Face folder: its config, tokenizer and licences, and its weights.

An import keeps what is not weights in ``hf/`` beside its own; an export takes it from there,
through any number of runs that each started from the one before.

The safetensors library checks every file of weights by its header. Bytes are read into the caller's
memory: a page of a file that the library maps counts as memory used, and one that shrinks meanwhile
ends the process.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_cream.checkpoint.iterations import RELEASE, read_saved_arguments, require_checkpoint
from megatron_cream.checkpoint.torch_dist_io import FileReader
from megatron_cream.errors import UserError, reason
from megatron_cream.options import read_json, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the types that weights may have."""

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""torch's names of them."""

HF_FOLDER = "hf"
"""Subfolder of an imported checkpoint with the files of its source."""

_TOKENIZER = "tokenizer_config.json"

_NAME_FILE = "imported_from.txt"
_PATTERNS = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_LEFT_OUT = (INDEX, "pytorch_model.bin.index.json")
_MOST_RUNS = 100  # in a chain of runs, each started from the one before


def find_hf_folder(name: str) -> Path:
    """Return the folder of ``--hf``: a folder, or the name of a repository on the hub.

    Raises:
        FileNotFoundError: no such folder, and the hub has no such repository or is out of reach.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or name[:1] in "." or name.count("/") != 1:
        raise FileNotFoundError(
            f"--hf is {name}: it must be a folder with config.json and safetensors files, or the "
            "name of a repository on the Hugging Face hub (OWNER/NAME)"
        )
    return _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"--hf is {name}: there is no such folder, and downloading it needs huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "*.safetensors"]))
    except Exception as error:  # of requests, httpx or the hub's own kind, by version
        raise FileNotFoundError(
            f"--hf is {name}: there is no such folder, and it cannot be downloaded "
            f"({reason(error)})"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no Hugging Face checkpoint")
    return read_object(path)


def copy_hf_files(source: Path, name: str, target: Path) -> None:
    """Copy what is not weights into ``target``, and note what the source was called."""
    target.mkdir(exist_ok=True)
    for path in list_other_files(source):
        shutil.copyfile(path, target / path.name)
    folder = Path(name)
    called = folder.resolve().name if folder.is_dir() else name
    (target / _NAME_FILE).write_text(called + "\n", encoding="utf-8")


def list_other_files(folder: Path) -> list[Path]:
    """Return configs, tokenizer files and licences of a Hugging Face folder.

    Raises:
        UserError: one is a link that is refused; see ``validate_link``.
    """
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    named = (path for path in found if path.name not in _LEFT_OUT)
    return sorted(path for path in map(validate_link, named) if path.is_file())


def validate_files(folder: Path) -> None:
    """Read what ``list_other_files`` will copy, before any weights are written.

    Raises:
        UserError: a link that is refused, or a damaged JSON file.
    """
    for path in list_other_files(folder):
        if path.suffix == ".json":
            read_json(path)
    if (folder / _TOKENIZER).is_file():
        read_object(folder / _TOKENIZER)


def raise_tokenizer_length(folder: Path, target_length: int) -> None:
    """Let the tokenizer know a new window: it warns beyond, and some servers cut there."""
    path = folder / _TOKENIZER
    if not path.is_file():
        return
    settings = read_object(path)
    most = settings.get("model_max_length")
    if isinstance(most, int | float) and most < target_length:
        settings["model_max_length"] = target_length
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def validate_link(path: Path) -> Path:
    """Return ``path`` if it is no link, or one that a copy of the model has.

    A link in a model's folder may lead to a file of the same folder, and to ``blobs/`` of a cache
    of the Hugging Face hub, where a snapshot's files are. Any other one would carry a file of this
    machine, a key for instance, into what is made of the model.

    Raises:
        UserError: a link that leads elsewhere, or to nothing.
    """
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if not real.exists():
        raise UserError(f"{path} is a link to {real}, which is not there: copy the file there")
    inside = Path(os.path.realpath(path.parent)) in real.parents
    if not (inside or _is_blob(real)):
        raise UserError(
            f"{path} is a link to {real}, outside the model's folder: it must be a file of the "
            "folder; copy it there or remove the link"
        )
    return path


def _is_blob(real: Path) -> bool:
    """Whether a file is one of a hub's cache: ``models--OWNER--NAME/blobs/HASH``."""
    repository = real.parents[1].name if len(real.parents) > 1 else ""
    hashed = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", real.name)
    return bool(hashed) and real.parent.name == "blobs" and repository.startswith("models--")


def read_source_name(folder: Path) -> str:
    """Return what the source of an import was called, a repository or the name of a folder."""
    file = folder / _NAME_FILE
    if not file.is_file():
        return folder.resolve().name
    lines = file.read_text("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else folder.resolve().name


def find_kept_files(checkpoint: str, args: Namespace) -> Path | None:
    """Return the ``hf/`` folder of the import that a checkpoint goes back to.

    Follows --pretrained-checkpoint (or --load with --finetune) from run to run. None where the
    first run started from nothing.

    Raises:
        FileNotFoundError: a checkpoint on the way, or the import's ``hf/``, is gone.
    """
    for _ in range(_MOST_RUNS):
        folder = require_checkpoint(checkpoint)
        for place in (Path(checkpoint), folder, folder.parent):
            if (place / HF_FOLDER / "config.json").is_file():
                return place / HF_FOLDER
        started_from = getattr(args, "pretrained_checkpoint", None)
        if started_from is None and getattr(args, "finetune", False):
            started_from = getattr(args, "load", None)
        if started_from is None or started_from == checkpoint:
            if folder.name == RELEASE:
                raise _gone_error(checkpoint)
            return None
        checkpoint = started_from
        found = read_saved_arguments(checkpoint) if Path(checkpoint).is_dir() else None
        if found is None:
            raise _gone_error(checkpoint)
        args = found
    raise _gone_error(checkpoint)


def validate_export_output(output: Path, checkpoint: str) -> Path:
    """Return ``output`` unless readers of the checkpoint would take it for a part of that.

    Raises:
        UserError: it is ``hf``, ``release`` or an iteration in the checkpoint's own folder.
    """
    read = output.name in (HF_FOLDER, RELEASE) or output.name.startswith("iter_")
    if read and output.parent in {
        Path(checkpoint).resolve(),
        require_checkpoint(checkpoint).parent,
    }:
        raise UserError(
            f"--output is {output}: a folder of that name is read as a part of the checkpoint; "
            "it must have another one"
        )
    return output


def _gone_error(checkpoint: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"--checkpoint goes back to {checkpoint}, which has no {HF_FOLDER}/config.json now; say "
        "with --hf which folder to take config and tokenizer from"
    )


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
