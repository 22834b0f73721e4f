# SPDX-License-Identifier: Apache-2.0
"""Finds the iterations of a run; reads the arguments, and writes the checksums, saved with one.

Checksums are written beside the files when they were saved. Each rank reads its own files again
when the save is through: they are in the memory of its machine, and the training goes on
meanwhile. CRC-32 of zlib takes a third of a second per GB.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cream.errors import UserError

if TYPE_CHECKING:
    from megatron_cream.checkpoint.torch_dist_table import CheckpointTable

TRACKER = "latest_checkpointed_iteration.txt"

RELEASE = "release"
"""What Megatron calls a checkpoint that is the start of training, without an iteration."""

FORMAT_FILE = "metadata.json"
"""Written last into an iteration: without it the save did not finish."""

_LONGEST = 18  # digits; what Megatron counts in


def read_tracker(root: Path) -> str | None:
    """Return what the tracker file names: digits of an iteration, or ``release``; None without one.

    Raises:
        UserError: it holds anything else.
    """
    path = root / TRACKER
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    digits = text.isascii() and text.isdecimal() and len(text) <= _LONGEST
    if text == RELEASE or digits:
        return text
    raise UserError(
        f"{path} holds {text[:40]!r}: it must be the number of an iteration in {root} "
        f"({_name_iterations(root)}), or {RELEASE}"
    )


def iteration_folder(root: Path, name: str) -> Path:
    """Return the folder of what a tracker names, whether it is there or not."""
    return root / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")


def is_iteration(folder: Path) -> bool:
    """Whether a folder is itself one iteration of a checkpoint."""
    return any((folder / name).is_file() for name in (FORMAT_FILE, ".metadata", "common.pt"))


def list_iterations(root: Path) -> list[Path]:
    """Return the iterations in a folder, oldest first.

    What a save that was killed leaves behind, files of ranks and no table of them, is none.
    """
    if not root.is_dir():
        return []
    numbered = ((iteration_number(path), path) for path in root.iterdir())
    return [
        path
        for _, path in sorted((n, p) for n, p in numbered if n is not None and _holds_iteration(p))
    ]


def iteration_number(folder: Path) -> int | None:
    """Return the iteration of a folder, by its name; None for another folder's."""
    found = re.fullmatch(r"iter_(\d{7,18})", folder.name)
    return int(found[1]) if found else None


def _holds_iteration(folder: Path) -> bool:
    return is_iteration(folder) or any(folder.glob("mp_rank_*"))


def tracker_command(folder: Path) -> str:
    """Return the command that makes an iteration the one to go on from."""
    name = RELEASE if folder.name == RELEASE else iteration_number(folder)
    return f"echo {name} > {shlex.quote(str(folder.parent / TRACKER))}"


def missing_tracker_error(root: Path) -> UserError | None:
    """Return why a folder cannot be used: it has iterations and does not say which is the latest.

    None where it has a tracker, or no iteration.
    """
    found = list_iterations(root)
    if not found or (root / TRACKER).is_file():
        return None
    finished = [path for path in found if (path / FORMAT_FILE).is_file()]
    return UserError(
        f"{root} has {_name_iterations(root)} and no {TRACKER}, which names the one to take; "
        f"write it: {tracker_command((finished or found)[-1])}"
    )


def _name_iterations(root: Path) -> str:
    names = [path.name for path in list_iterations(root)]
    return f"{len(names)} iterations" + (f", {names[0]} to {names[-1]}" if names else "")


def find_checkpoint(path: str) -> Path | None:
    """Return the folder of the latest torch_dist checkpoint under ``path``, or None.

    ``path`` is what Megatron was given as --save, or one ``iter_...`` folder in it.

    Raises:
        UserError: the folder that Megatron's tracker file names is missing or not whole, the
            tracker is damaged, or there are iterations and no tracker.
    """
    root = Path(path)
    if (root / FORMAT_FILE).is_file():
        return root
    name = read_tracker(root)
    if name is None:
        if error := missing_tracker_error(root):
            raise error
        return None
    folder = iteration_folder(root, name)
    if not (folder / FORMAT_FILE).is_file():
        from megatron_cream.checkpoint.doctor import advise_earlier_iteration

        raise UserError(
            f"checkpoint {path}: {TRACKER} names {folder.name}, which is missing or not whole; "
            f"{advise_earlier_iteration(folder, '--checkpoint')}"
        )
    return folder


def require_checkpoint(path: str) -> Path:
    """Return what ``find_checkpoint`` finds for --checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = find_checkpoint(path) if path else None
    if folder is None:
        raise FileNotFoundError(f"--checkpoint is {path}: it must hold a torch_dist checkpoint")
    return folder


def read_saved_arguments(path: str) -> Namespace | None:
    """Return the arguments saved with the latest checkpoint under ``path``, or None.

    No code from the checkpoint runs.
    """
    folder = find_checkpoint(path)
    return None if folder is None else read_arguments(folder)


def read_arguments(folder: Path) -> Namespace | None:
    """Return the arguments saved with one iteration, or None where it has none.

    Raises:
        OSError, UserError: it is damaged, or names what Megatron does not write.
    """
    from megatron_cream.checkpoint.torch_dist_table import read_table

    args = read_common(read_table(folder)).get("args")
    if not isinstance(args, Namespace | None):
        raise UserError(
            f"checkpoint {folder} is damaged: its arguments are a {type(args).__name__}"
        )
    return args


def read_common(table: CheckpointTable) -> dict[str, Any]:
    """Return what all ranks of the run had in common, without running code from the checkpoint.

    Raises:
        OSError, UserError: it is missing or damaged, or names what Megatron does not write.
    """
    from megatron_cream.checkpoint.torch_dist_table import (
        COMMON,
        COMMON_FILE,
        METADATA,
        unpickle_object,
    )

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


def require_arguments(folder: Path) -> Namespace:
    """Return what ``read_arguments`` reads.

    Raises:
        UserError: there are none, or as ``read_arguments``.
    """
    args = read_arguments(folder)
    if args is None:
        raise UserError(f"checkpoint {folder} has no arguments, which say what its model is")
    return args


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
