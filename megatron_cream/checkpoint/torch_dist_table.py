# SPDX-License-Identifier: Apache-2.0
"""Reads the table and the objects of a torch_dist checkpoint, without running what is in them.

The table, ``.metadata``, says which record of which file holds what. A global tensor lies in chunks
over the files of all ranks that saved it, an object in one record. A record is what ``torch.save``
writes, a zip archive.

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
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_cream.errors import UserError, name_damaged

RecordKey = tuple[str, tuple[int, ...]]
"""Key and offset of a chunk; () is the offset of an object."""

COMMON = "common_state/shard_0_1"
"""The object with what all ranks have in common, a run's arguments among it."""

COMMON_FILE = "common.pt"
"""Where older releases of Megatron keep it."""


@dataclass(frozen=True)
class FileRecord:
    """A stretch of a file.

    Attributes:
        file: its name in the folder.
        start: first byte.
        length: bytes.
        transformed: torch was asked to compress or encrypt it.
    """

    file: str
    start: int
    length: int
    transformed: bool

    @classmethod
    def of(cls, info: Any) -> FileRecord:
        """Return what torch's ``_StorageInfo`` says."""
        transformed = bool(getattr(info, "transform_descriptors", None))
        return cls(info.relative_path, info.offset, info.length, transformed)


@dataclass(frozen=True)
class CheckpointTable:
    """What ``.metadata`` says; every chunk and object has its record."""

    folder: Path
    tensors: dict[str, TensorStorageMetadata]
    objects: tuple[str, ...]
    records: dict[RecordKey, FileRecord]

    def ends(self) -> dict[str, int]:
        """Return the bytes that each file must have at least."""
        ends: dict[str, int] = {}
        for record in self.records.values():
            end = record.start + record.length
            ends[record.file] = max(ends.get(record.file, 0), end)
        return ends

    def missing_files(self) -> Iterator[OSError | UserError]:
        """Yield an error for each file that is missing or shorter than it must be."""
        for name, end in sorted(self.ends().items()):
            file = self.folder / name
            if not file.is_file():
                yield FileNotFoundError(f"checkpoint {self.folder} lacks its file {name}")
            elif (size := file.stat().st_size) < end:
                yield UserError(f"{file} has {size} bytes, .metadata says {end}: it is cut off")

    def read_object(self, name: str) -> Any:
        """Return an object, without running code from the checkpoint.

        Raises:
            OSError: its file is missing.
            UserError: it is damaged, or names what Megatron does not write.
        """
        record = self.records[name, ()]
        path = self.folder / record.file
        with path.open("rb") as file:
            file.seek(record.start)
            data = io.BytesIO(file.read(record.length))
        return unpickle_object(data, f"{path}: {name}")


def read_table(folder: Path) -> CheckpointTable:
    """Read and check ``.metadata``, without running code from the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged, or names what torch and Megatron do not write.
    """
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {METADATA}: it must be one iteration of a torch_dist checkpoint"
        )
    state = path.stat()
    return _read_table(folder, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2)  # a start asks for it several times, and it may have 100 MB
def _read_table(folder: Path, *_: int) -> CheckpointTable:
    path = folder / METADATA
    metadata = unpickle_metadata(path)
    try:
        _validate(metadata)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    entries = metadata.state_dict_metadata
    table = CheckpointTable(
        folder,
        {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)},
        tuple(key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)),
        # Without the index that torch numbers a rank's chunks by.
        {
            (i.fqn, tuple(i.offset or ())): FileRecord.of(s)
            for i, s in metadata.storage_data.items()
        },
    )
    chunks = ((key, tuple(c.offsets)) for key, entry in table.tensors.items() for c in entry.chunks)
    needed = chain(chunks, ((name, ()) for name in table.objects))
    lacking = next((place for place in needed if place not in table.records), None)
    if lacking is not None:
        raise UserError(f"{path} is damaged: {lacking[0]} at {lacking[1]} has no record")
    return table


def _validate(metadata: Any) -> None:
    """Refuse what does not fit together: a damaged pickle may still be read to its end.

    Raises:
        ValueError: saying what is wrong.
    """
    entries = getattr(metadata, "state_dict_metadata", None)
    stored = getattr(metadata, "storage_data", None)
    if not (isinstance(metadata, Metadata) and isinstance(entries, dict)):
        raise ValueError("it is no table of a checkpoint")
    if not isinstance(stored, dict):
        raise ValueError("it has no records")
    for key, entry in entries.items():
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is no name")
        if isinstance(entry, TensorStorageMetadata):
            _validate_tensor(key, entry)
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{key} is neither a tensor nor an object")
    for index, info in stored.items():
        _validate_record(index, info, entries)


def _validate_tensor(key: str, entry: TensorStorageMetadata) -> None:
    size: Any = getattr(entry, "size", None)
    chunks: Any = getattr(entry, "chunks", None)
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    if not (_sizes(size) and isinstance(chunks, list) and isinstance(dtype, torch.dtype)):
        raise ValueError(f"{key} has no size or type")
    for chunk in chunks:
        at: Any = getattr(chunk, "offsets", None)
        by: Any = getattr(chunk, "sizes", None)
        fits = _sizes(at) and _sizes(by) and len(at) == len(by) == len(size)
        if not fits or any(o + n > s for o, n, s in zip(at, by, size, strict=True)):
            raise ValueError(f"{key} has a chunk outside its size {list(size)}")
    # Only buffers of an optimizer have gaps.
    covered = sum(prod(chunk.sizes) for chunk in chunks)
    if covered != prod(size) and not key.startswith("optimizer."):
        raise ValueError(f"{key} has {covered} elements in its chunks, by its size {prod(size)}")


def _validate_record(index: Any, info: Any, entries: dict[str, Any]) -> None:
    key, at = getattr(index, "fqn", None), getattr(index, "offset", None)
    known = isinstance(key, str) and key in entries and (at is None or _sizes(at))
    if not (isinstance(index, MetadataIndex) and known):
        raise ValueError(f"it has a record of {key!r}, which it does not know")
    name = getattr(info, "relative_path", None)
    # A name with a folder in it would have another file read than one of the checkpoint.
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{key} is in the file {name!r}, which must be one in its folder")
    if "\0" in name or not _sizes([getattr(info, "offset", None), getattr(info, "length", None)]):
        raise ValueError(f"{key} has no place in {name!r}")


def _sizes(values: Any) -> bool:
    listed = isinstance(values, (tuple, list))
    return listed and all(type(value) is int and 0 <= value < 2**62 for value in values)


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
    from megatron_cream.mcore.build_model import named_by_megatron

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
    from megatron_cream.mcore.build_model import is_extra_state_name

    listed = is_extra_state_name(module, name) or f"{module}.{name}" in _trusted_names()
    return _Placeholder if listed else None


class _Placeholder(dict):  # what a pickle may fill, and nothing else
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass
