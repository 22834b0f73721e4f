# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles of a torch_dist checkpoint without running what is in them.

A pickle may name any function of any package and have it called. Megatron and torch read two kinds
of pickles of a checkpoint without limits: ``.metadata``, and the records of objects, among them the
common state with a run's arguments. Here only what the two of them write is accepted: of torch,
the names below and torch's own list for ``weights_only``; of Megatron, its ``SAFE_GLOBALS``.

Objects are read by torch's own limited unpickler. ``.metadata``, of up to 100 MB, is not: that
one is written in Python, and reads files of ``torch.save`` alone.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_cream.errors import UserError
from megatron_cream.mcore.safe_globals import is_extra_state_name, named_by_megatron

TRUSTED_VARIABLE = "MEGATRON_CREAM_TRUSTED_GLOBALS"
"""Environment variable with further names that a user accepts, ``package.module.Name,...``."""

METADATA = ".metadata"

_PLANNER = ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
_TABLE = (
    *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
# What torch and Megatron write into .metadata; torch's types of numbers come on top.
_IN_METADATA = frozenset(
    {
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in _TABLE),
        *(f"torch.distributed.checkpoint.planner.{name}" for name in _PLANNER),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    }
)

# What Megatron's arguments and states name beside its SAFE_GLOBALS. By the name in the pickle, with
# the one it has here where numpy or Python moved it since.
_IN_OBJECTS = {
    "numpy.core.multiarray._reconstruct": "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct": None,
    "numpy.core.multiarray.scalar": "numpy._core.multiarray.scalar",
    "numpy._core.multiarray.scalar": None,
    "pathlib._local.PosixPath": "pathlib.PosixPath",
    "collections.defaultdict": None,
    "datetime.timedelta": None,
    "datetime.datetime": None,
}


def unpickle_metadata(path: Path) -> Any:
    """Return what ``.metadata`` holds.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or names something else than torch and Megatron write.
    """
    with path.open("rb") as file, name_damaged(path):
        return _ListedUnpickler(file, path, _find_in_metadata).load()


class _ListedUnpickler(pickle.Unpickler):
    """Reads a pickle; each name in it is what ``find`` returns for it, or refused where None."""

    def __init__(self, file: Any, place: object, find: Callable[[str, str], Any]) -> None:
        super().__init__(file)
        self._place, self._find = place, find

    def find_class(self, module: str, name: str) -> Any:
        found = self._find(module, name)
        if found is None:
            raise _foreign_name_error(self._place, [f"{module}.{name}"])
        return found


def _find_in_metadata(module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    if full not in _IN_METADATA and full not in _trusted_names():
        return None
    return _named(_IN_OBJECTS.get(full) or full)


def unpickle_object(data: io.BytesIO, place: str) -> Any:
    """Return an object that ``torch.save`` wrote, tensors on the CPU.

    Args:
        place: its file and name, for the message.

    Raises:
        UserError: it is damaged, or names something that Megatron does not write.
    """
    with name_damaged(place), torch.serialization.safe_globals(_allowed_globals()):
        try:
            value = torch.load(data, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            data.seek(0)
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(data):
                raise _foreign_name_error(place, names) from None
            raise
    if place.partition("/shard_")[0].endswith("._extra_state"):
        _validate_hidden_pickle(value, place)
    return value


@contextmanager
def only_listed_globals() -> Iterator[None]:
    """Keep torch from reading an object's pickle without limits, whatever its caller asks for."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            yield
    finally:
        os.environ.pop(_FORCE)
        if before is not None:
            os.environ[_FORCE] = before


_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _allowed_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what is accepted beyond torch's list and Megatron's, as ``safe_globals`` takes it."""
    names = {**_IN_OBJECTS, **dict.fromkeys(_trusted_names())}
    found = {name: _named(here or name) for name, here in names.items()}
    return [(value, name) for name, value in (found | named_by_megatron()).items()]


def _named(full: str) -> Any:
    module, _, name = full.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{TRUSTED_VARIABLE} has {full!r}: there is no such name") from None


def _trusted_names() -> set[str]:
    return set(filter(None, os.environ.get(TRUSTED_VARIABLE, "").split(",")))


def _foreign_name_error(place: object, names: list[str]) -> UserError:
    few = ",".join(sorted(names)[:3])
    return UserError(
        f"{place} names {few}, which neither torch nor Megatron writes into a checkpoint: reading "
        f"it would run code from whoever made it. If you trust it: {TRUSTED_VARIABLE}={few}"
    )


def _validate_hidden_pickle(value: Any, place: str) -> None:
    """Refuse a pickle within a tensor that names what it should not.

    Layers of Transformer Engine keep their fp8 state so, and read it without limits.
    """
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, io.BytesIO):
        unpickle_object(value, place)
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
        with name_damaged(place):
            hidden = io.BytesIO(value.numpy().tobytes())
            _ListedUnpickler(hidden, place, _find_placeholder).load()


def _find_placeholder(module: str, name: str) -> Any:
    """Find nothing that runs: the pickle is looked through for its names alone."""
    listed = is_extra_state_name(module, name) or f"{module}.{name}" in _trusted_names()
    return _Placeholder if listed else None


class _Placeholder(dict):  # what a pickle may fill, and nothing else
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@contextmanager
def name_damaged(place: object) -> Iterator[None]:
    """Turn what damaged bytes raise into one line: a UserError with their place.

    That may be any exception, as Python's documentation of pickle says: damaged bytes are still
    instructions, carried out up to where they make no sense.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{place} is damaged and cannot be read: {reason}") from None
