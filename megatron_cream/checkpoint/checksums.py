# SPDX-License-Identifier: Apache-2.0
"""Checksums of the files of one iteration, written beside them when they were saved.

Each rank reads its own files again when the save is through: they are in the memory of its
machine, and the training goes on meanwhile. CRC-32 of zlib takes a third of a second per GB.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError

_MARK = "megatron_cream"
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


def write_sums(folder: Path, rank: int, sums: dict[str, FileChecksum]) -> None:
    """Write the checksums of a rank's files; a change of any byte of what is written shows."""
    text = _text({"made_by": _MARK, "algorithm": "crc32", "files": sums})
    (folder / _NAME.format(rank)).write_text(text)


def write(folder: Path, rank: int = 0) -> None:
    """Write the checksums of the files that a rank wrote."""
    write_sums(folder, rank, {path.name: checksum(path) for path in own_files(folder, rank)})


def read(folder: Path) -> tuple[dict[str, FileChecksum], list[str]]:
    """Return the checksums of all ranks by file, and what is wrong with the files they are in."""
    sums: dict[str, FileChecksum] = {}
    wrong = []
    for path in sorted(folder.glob(_PATTERN)):
        try:
            sums |= _read_one(path)
        except (UserError, OSError) as error:
            wrong.append(str(error))
    return sums, wrong


def _read_one(path: Path) -> dict[str, FileChecksum]:
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
        files = {str(name): (int(size), str(crc)) for name, (size, crc) in found["files"].items()}
        content = {"made_by": found["made_by"], "algorithm": found["algorithm"], "files": files}
        whole = _text(content) == text and found["algorithm"] == "crc32"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: its own checksum does not fit")
    return files


def _text(content: dict[str, Any]) -> str:
    own = f"{zlib.crc32(json.dumps(content).encode()):08x}"
    return json.dumps({**content, "of_this": own}, indent=1) + "\n"


def remove(folder: Path) -> None:
    """Remove what an earlier save into the same folder wrote: its files are about to change."""
    for path in folder.glob(_PATTERN):
        if re.search(rf'"made_by": "{_MARK}"', path.read_text(errors="replace")):
            path.unlink()


# One thread, so that an iteration's files are read one after the other; Python waits for it at the
# end of the process.
_reader = ThreadPoolExecutor(1, "checksums")


def write_later(folder: Path, rank: int) -> None:
    """Write the checksums of a rank's files while the process goes on.

    A failure is printed: the checkpoint is whole, and a run does not end for its checksums.
    """
    _reader.submit(_write_or_report, folder, rank)


def _write_or_report(folder: Path, rank: int) -> None:
    try:
        if folder.is_dir():  # --save-retain-interval removes iterations
            write(folder, rank)
    except OSError as error:
        print(f"megatron_cream: no checksums of {folder}: {error}", file=sys.stderr, flush=True)


def wait() -> None:
    """Wait until all checksums that were asked for are written."""
    _reader.submit(lambda: None).result()


def differences(folder: Path, sums: dict[str, FileChecksum], names: Iterable[str]) -> Iterable[str]:
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
