# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles of a torch_dist checkpoint without running what is in them.

A pickle may name any function of any package and have it called. Megatron and torch read two kinds
of pickles of a checkpoint without limits: ``.metadata``, and the records of objects, among them the
common state with a run's arguments. Here only what the two of them write is accepted: of torch,
the names below and torch's own list for ``weights_only``; of Megatron, its ``SAFE_GLOBALS``.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from megatron_cream.errors import UserError

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
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout": None,
}
_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums")  # all of theirs


def unpickle_metadata(path: Path) -> Any:
    """Return what ``.metadata`` holds.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or names something else than torch and Megatron write.
    """
    with path.open("rb") as file, name_damaged(path):
        return _MetadataUnpickler(file, path).load()


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if full not in _IN_METADATA and full not in _trusted_names():
            raise _foreign_name_error(self._path, [full])
        return super().find_class(module, name)


def unpickle_object(data: io.BytesIO | Path, place: str) -> Any:
    """Return an object that ``torch.save`` wrote, tensors on the CPU.

    Args:
        data: the record, or a file that is one.
        place: its file and name, for the message.

    Raises:
        UserError: it is damaged, or names something that Megatron does not write.
    """
    with name_damaged(place), torch.serialization.safe_globals(_allowed_globals()):
        try:
            value = torch.load(_rewound(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(_rewound(data)):
                raise _foreign_name_error(place, names) from None
            raise
    if place.partition("/shard_")[0].endswith("._extra_state"):
        _validate_hidden_pickle(value, place)
    return value


def _rewound(data: io.BytesIO | Path) -> io.BytesIO | Path:
    if isinstance(data, io.BytesIO):
        data.seek(0)
    return data


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


def _allowed_globals() -> list[tuple[Any, str]]:
    """Return what is accepted beyond torch's list and Megatron's, as ``safe_globals`` takes it."""
    import megatron.core  # noqa: F401  # adds its SAFE_GLOBALS to torch's

    names = {**_IN_OBJECTS, **dict.fromkeys(_trusted_names())}
    listed = [(_named(here or name), name) for name, here in names.items()]
    for module in _ENUMS:
        for name, found in vars(importlib.import_module(module)).items():
            if isinstance(found, type) and issubclass(found, Enum):
                listed.append((found, f"{module}.{name}"))
    return listed


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
            _NameChecker(io.BytesIO(value.numpy().tobytes()), place).load()


class _NameChecker(pickle.Unpickler):
    """Looks through a pickle; what it names is stood in for, so that nothing runs."""

    def __init__(self, file: Any, place: str) -> None:
        super().__init__(file)
        self._place = place

    def find_class(self, module: str, name: str) -> Any:
        from megatron.core.safe_globals import SafeUnpickler

        listed = (module, name) in SafeUnpickler._SAFE_CLASSES
        if not listed and f"{module}.{name}" not in _trusted_names():
            raise _foreign_name_error(self._place, [f"{module}.{name}"])
        return _Placeholder


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
