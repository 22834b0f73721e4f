# SPDX-License-Identifier: Apache-2.0
"""Says what the files of one iteration hold and held: its table, and the checksums of its save.

The table is ``.metadata``: which record of which file holds what. A global tensor lies in chunks
over the files of all ranks that saved it, an object in one record. A record is what ``torch.save``
writes, a zip archive.

Checksums are written beside the files when they were saved. Each rank reads its own files again
when the save is through: they are in the memory of its machine, and the training goes on
meanwhile. CRC-32 of zlib takes a third of a second per GB.
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

from megatron_cream.checkpoint.unpickling import METADATA, unpickle_metadata, unpickle_object
from megatron_cream.errors import UserError

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


def read_common(table: CheckpointTable) -> dict[str, Any]:
    """Return what all ranks of the run had in common, without running code from the checkpoint.

    Raises:
        OSError, UserError: it is missing or damaged, or names what Megatron does not write.
    """
    path = table.folder / COMMON_FILE
    if path.is_file():
        found = [unpickle_object(io.BytesIO(path.read_bytes()), str(path))]
        place = str(path)
    elif (COMMON, ()) in table.records:
        found = table.read_object(COMMON)
        place = f"{table.folder / table.records[COMMON, ()].file}: {COMMON}"
    else:
        raise UserError(f"{table.folder} has neither {COMMON_FILE} nor {COMMON} in its {METADATA}")
    if not (isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict)):
        raise UserError(f"{place} is damaged: it must be the common state of a run")
    return found[0]


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


_NAME = "megatron_cream_checksums_{:05d}.json"
_PATTERN = "megatron_cream_checksums_*.json"
_WITHOUT_RANK = (".metadata", "metadata.json", "common.pt", "integrity.json")
_BLOCK = 4 << 20

FileChecksum = tuple[int, str]
"""Bytes of a file, and its CRC-32 as eight hexadecimal digits."""


def checksum(path: Path) -> FileChecksum:
    """Return size and checksum of a file, read in the memory of one block."""
    block, size, crc = memoryview(bytearray(_BLOCK)), 0, 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
            size += count
    return size, f"{crc:08x}"


def own_files(folder: Path, rank: int) -> list[Path]:
    """Return the files of an iteration that a rank wrote; rank 0 also those without a rank."""
    found = list(folder.glob(f"__{rank}_*"))
    common = _WITHOUT_RANK if rank == 0 else ()
    return sorted([*found, *(folder / name for name in common if (folder / name).is_file())])


def write_checksums_of(folder: Path, rank: int, sums: dict[str, FileChecksum]) -> None:
    """Write the checksums of a rank's files; a change of any byte of what is written shows."""
    text = _checksum_text({"made_by": "megatron_cream", "algorithm": "crc32", "files": sums})
    (folder / _NAME.format(rank)).write_text(text)


def write_checksums(folder: Path, rank: int = 0) -> None:
    """Write the checksums of the files that a rank wrote."""
    write_checksums_of(
        folder, rank, {path.name: checksum(path) for path in own_files(folder, rank)}
    )


def read_checksums(folder: Path) -> tuple[dict[str, FileChecksum], list[str]]:
    """Return the checksums of all ranks by file, and what is wrong with the files they are in."""
    sums: dict[str, FileChecksum] = {}
    wrong = []
    for path in sorted(folder.glob(_PATTERN)):
        try:
            sums |= _read_checksum_file(path)
        except (UserError, OSError) as error:
            wrong.append(str(error))
    return sums, wrong


def _read_checksum_file(path: Path) -> dict[str, FileChecksum]:
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
        files = {str(name): (int(size), str(crc)) for name, (size, crc) in found["files"].items()}
        content = {"made_by": found["made_by"], "algorithm": found["algorithm"], "files": files}
        whole = _checksum_text(content) == text and found["algorithm"] == "crc32"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: its own checksum does not fit")
    return files


def _checksum_text(content: dict[str, Any]) -> str:
    own = f"{zlib.crc32(json.dumps(content).encode()):08x}"
    return json.dumps({**content, "of_this": own}, indent=1) + "\n"


def remove_checksums(folder: Path) -> None:
    """Remove what an earlier save into the same folder wrote: its files are about to change."""
    for path in folder.glob(_PATTERN):
        if '"made_by": "megatron_cream"' in path.read_text(errors="replace"):
            path.unlink()


# One thread, so that an iteration's files are read one after the other; Python waits for it at the
# end of the process.
_reader = ThreadPoolExecutor(1, "checksums")


def write_checksums_later(folder: Path, rank: int) -> None:
    """Write the checksums of a rank's files while the process goes on.

    A failure is printed: the checkpoint is whole, and a run does not end for its checksums.
    """
    _reader.submit(_write_checksums_or_report, folder, rank)


def _write_checksums_or_report(folder: Path, rank: int) -> None:
    try:
        if folder.is_dir():  # --save-retain-interval removes iterations
            write_checksums(folder, rank)
    except OSError as error:
        print(f"megatron_cream: no checksums of {folder}: {error}", file=sys.stderr, flush=True)


def checksum_differences(
    folder: Path, sums: dict[str, FileChecksum], names: Iterable[str]
) -> Iterable[str]:
    """Yield which of the named files differ from their checksums; all are read."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _difference(folder / name, sums[name]), names)
        yield from filter(None, found)


def _difference(path: Path, wanted: FileChecksum) -> str | None:
    if not path.is_file():
        return f"{path} is missing: it was there when the checkpoint was saved"
    if (size := path.stat().st_size) != wanted[0]:
        return f"{path} has {size} bytes: {wanted[0]} were saved"
    found = checksum(path)[1]
    return None if found == wanted[1] else f"{path} has checksum {found}: {wanted[1]} was saved"
