# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face folder that are not weights, and where they are kept.

An import keeps them in ``hf/`` beside the weights; an export takes them from there, through any
number of runs that each started from the one before.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint.saved import latest_checkpoint, saved_arguments
from megatron_cream.checkpoint.weights import INDEX
from megatron_cream.errors import UserError

RELEASE = "release"
"""What Megatron calls a checkpoint that is the start of training, without an iteration."""

KEPT = "hf"
"""Subfolder of an imported checkpoint with the files of its source."""

_NAME_FILE = "imported_from.txt"
_PATTERNS = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_LEFT_OUT = (INDEX, "pytorch_model.bin.index.json")
_MOST_RUNS = 100  # in a chain of runs, each started from the one before


def find_source(name: str) -> Path:
    """Return the folder of ``--hf``: a folder, or the name of a repository on the hub.

    Raises:
        FileNotFoundError: no such folder, and the hub has no such repository or is out of reach.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"--hf is {name}: there is no such folder, and it cannot be downloaded ({reason})"
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
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    return config


def keep_files(source: Path, name: str, target: Path) -> None:
    """Copy what is not weights into ``target``, and note what the source was called."""
    target.mkdir(exist_ok=True)
    for path in other_files(source):
        shutil.copyfile(path, target / path.name)
    folder = Path(name)
    called = folder.resolve().name if folder.is_dir() else name
    (target / _NAME_FILE).write_text(called + "\n")


def other_files(folder: Path) -> list[Path]:
    """Return configs, tokenizer files and licences of a Hugging Face folder."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name not in _LEFT_OUT)


def source_name(folder: Path) -> str:
    """Return what the source of an import was called, a repository or the name of a folder."""
    file = folder / _NAME_FILE
    return file.read_text().strip() if file.is_file() else folder.resolve().name


def kept_files(checkpoint: str, args: Namespace) -> Path | None:
    """Return the ``hf/`` folder of the import that a checkpoint goes back to.

    Follows --pretrained-checkpoint (or --load with --finetune) from run to run. None where the
    first run started from nothing.

    Raises:
        FileNotFoundError: a checkpoint on the way, or the import's ``hf/``, is gone.
    """
    for _ in range(_MOST_RUNS):
        folder = latest_checkpoint(checkpoint)
        for place in (Path(checkpoint), folder, folder.parent):
            if (place / KEPT / "config.json").is_file():
                return place / KEPT
        started_from = getattr(args, "pretrained_checkpoint", None)
        if started_from is None and getattr(args, "finetune", False):
            started_from = getattr(args, "load", None)
        if started_from is None or started_from == checkpoint:
            if folder.name == RELEASE:
                raise _gone(checkpoint)
            return None
        checkpoint = started_from
        found = saved_arguments(checkpoint) if Path(checkpoint).is_dir() else None
        if found is None:
            raise _gone(checkpoint)
        args = found
    raise _gone(checkpoint)


def _gone(checkpoint: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"--checkpoint goes back to {checkpoint}, which has no {KEPT}/config.json now; say with "
        "--hf which folder to take config and tokenizer from"
    )
