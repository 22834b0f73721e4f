# SPDX-License-Identifier: Apache-2.0
"""Finds damage in one iteration: by its table and sizes before a load, or by reading all of it."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shlex
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_cream.checkpoint.iterations import (
    FORMAT_FILE,
    FileChecksum,
    checksum_differences,
    is_iteration,
    iteration_folder,
    iteration_number,
    list_iterations,
    missing_tracker_error,
    read_checksums,
    read_common,
    read_tracker,
    tracker_command,
)
from megatron_cream.checkpoint.torch_dist_io import FileReader, find_data
from megatron_cream.checkpoint.torch_dist_table import CheckpointTable, RecordKey, read_table
from megatron_cream.errors import UserError

FORMAT = "torch_dist"


def find_problems(folder: Path, objects: bool = True) -> Iterator[str]:
    """Yield what is wrong with an iteration, a line each, naming the file.

    Tensors are not read. No code from the checkpoint runs.

    Args:
        objects: read all objects, such as states of random numbers, and not the common state alone.
    """
    wrong = _wrong_format(folder)
    if wrong is not None:
        yield wrong
    try:
        table = read_table(folder)
    except (UserError, OSError) as error:
        yield str(error)
        return
    lacking = [str(error) for error in table.missing_files()]
    yield from lacking
    if not lacking:  # or the same files would be named again
        yield from _wrong_objects(table, objects)


def validate_iteration(folder: Path, flag: str, objects: bool = True) -> None:
    """Refuse an iteration that is not whole.

    Args:
        flag: and its value, what named the iteration.

    Raises:
        UserError: naming the file, and how to go on from the iteration before.
    """
    wrong = next(find_problems(folder, objects), None)
    if wrong is not None:
        raise UserError(f"{flag}: {wrong}; {advise_earlier_iteration(folder, flag)}")


def advise_earlier_iteration(folder: Path, flag: str) -> str:
    """Return how to go on from the newest whole iteration before ``folder``."""
    for path in reversed(list_iterations(folder.parent)):
        if path.name < folder.name and next(find_problems(path), None) is None:
            if flag.startswith("--checkpoint"):
                return f"{path.name} before it is whole: --checkpoint {shlex.quote(str(path))}"
            return (
                f"{path.name} before it is whole: go on from it with --ckpt-step "
                f"{iteration_number(path)}, or for good by: {tracker_command(path)}"
            )
    return f"{folder.parent} has no whole iteration before it"


def _wrong_format(folder: Path) -> str | None:
    path = folder / FORMAT_FILE
    if not path.is_file():
        return f"{folder} lacks {FORMAT_FILE}, which is written last: its save did not finish"
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != FORMAT:
        return f"{path} has sharded_backend {str(backend)[:40]!r}: it must be {FORMAT!r}"
    return None


def _wrong_objects(table: CheckpointTable, all_of_them: bool) -> Iterator[str]:
    try:
        read_common(table)
    except (UserError, OSError) as error:
        yield str(error)
    for name in table.objects if all_of_them else ():
        try:
            if not name.startswith("common_state/"):
                table.read_object(name)
        except (UserError, OSError) as error:
            yield str(error)


_MEGATRONS = "integrity.json"  # of --verify-integrity
_BLOCK = 4 << 20

EXAMPLES = """
    megatron-cream doctor runs/cream                  # the latest iteration
    megatron-cream doctor runs/cream/iter_0000010     # one of them

Sizes, every record, and the checksums that megatron_cream writes when it saves; a checkpoint of
another trainer has those in its records. Nothing in the checkpoint is run.
"""


@dataclass(frozen=True)
class IterationReport:
    """What was found in one iteration.

    Attributes:
        folder: the iteration.
        nbytes: of all its files.
        records: tensors' chunks and objects.
        summed: files compared with a checksum of their own.
        files: all that ``.metadata`` and Megatron need.
        problems: a line each, naming the file; none in a whole checkpoint.
    """

    folder: Path
    nbytes: int
    records: int
    summed: int
    files: int
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        head = f"{self.folder}: {self.records} records, {self.nbytes / 1e9:.2f} GB"
        rest = self.files - self.summed
        compared = f"{self.summed} of {self.files} files compared with the checksum of their save"
        beside = "; of the others, records with a checksum in them were compared with that"
        return [head, compared + (beside if rest else ""), *self.problems]


def examine_iteration(path: str) -> IterationReport:
    """Read one iteration whole: sizes, every record, and checksums where there are any.

    No code from the checkpoint runs.

    Args:
        path: folder given to --save, of which the latest iteration is taken, or one iteration.

    Raises:
        UserError, FileNotFoundError: there is no checkpoint.
    """
    folder = _find_iteration(path)
    found = list(find_problems(folder))
    sums, wrong = read_checksums(folder)
    wrong += checksum_differences(folder, sums, sums)
    table = None
    try:
        table = read_table(folder)
        names = set(table.ends())
    except (UserError, OSError):  # is among the problems already
        names = {file.name for file in folder.glob("*.distcp")}
    names |= {name for name in (".metadata", "metadata.json") if (folder / name).is_file()}
    hashed, differing = _compare_megatrons_checksums(folder, sums)
    wrong += differing
    if table is not None and not found:
        wrong += _wrong_records(table, sums.keys() | hashed)
    nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    summed = len(names & (sums.keys() | hashed))
    problems = tuple(dict.fromkeys([*found, *wrong]))
    records = len(table.records) if table else 0
    return IterationReport(folder, nbytes, records, summed, len(names), problems)


def _find_iteration(path: str) -> Path:
    root = Path(path)
    name = read_tracker(root)
    folder = root if name is None else iteration_folder(root, name)
    if name is None and (error := missing_tracker_error(root)):
        raise error
    if name is None and not is_iteration(folder) and not any(folder.glob("*.distcp")):
        raise FileNotFoundError(f"CHECKPOINT is {path}: it must hold a torch_dist checkpoint")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: the tracker file in {root} names it")
    return folder


def _compare_megatrons_checksums(
    folder: Path, sums: dict[str, FileChecksum]
) -> tuple[set[str], list[str]]:
    """Compare files without a checksum of ours with Megatron's; return them and what differs."""
    path = folder / _MEGATRONS
    if not path.is_file():
        return set(), []
    try:
        wanted = {str(n): str(h) for n, h in json.loads(path.read_bytes())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set(), [f"{path} is damaged: it must be Megatron's list of checksums"]
    names = {name for name in wanted.keys() - sums.keys() if Path(name).name == name}
    wrong = [name for name in sorted(names) if _sha256(folder / name) != wanted[name]]
    return names, [f"{folder / name} is not what {path} says was saved" for name in wrong]


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_records(table: CheckpointTable, summed: set[str]) -> list[str]:
    """Read the records of all files, those without a checksum of their own with that in them."""
    by_file: dict[str, list[RecordKey]] = {}
    for key, record in sorted(table.records.items(), key=lambda item: item[1].start):
        by_file.setdefault(record.file, []).append(key)
    chunks = {
        (key, tuple(chunk.offsets)): chunk
        for key, entry in table.tensors.items()
        for chunk in entry.chunks
    }

    def look(name: str) -> list[str | None]:
        with closing(FileReader()) as files:
            compare = name not in summed
            return [
                _wrong_record(table, key, chunks.get(key), files, compare) for key in by_file[name]
            ]

    with ThreadPoolExecutor() as pool:
        return [line for lines in pool.map(look, by_file) for line in lines if line]


def _wrong_record(
    table: CheckpointTable,
    key: RecordKey,
    chunk: ChunkStorageMetadata | None,
    files: FileReader,
    compare: bool,
) -> str | None:
    record = table.records[key]
    place = f"{table.folder / record.file}: {key[0]}"
    section = files.open_section(table.folder / record.file, record.start, record.length)
    if chunk is not None and not record.transformed:
        try:
            find_data(section, chunk, table.tensors[key[0]].properties.dtype, place)
        except UserError as error:
            return str(error)
    if compare and not _record_fits(section):
        return f"{place} is damaged: its bytes do not fit the checksum in the record"
    return None


def _record_fits(section: io.BufferedReader) -> bool:
    """Compare a record with the checksums that ``torch.save`` puts into it; 0 is none."""
    try:
        with zipfile.ZipFile(section) as archive:
            for entry in archive.infolist():
                if entry.CRC:
                    with archive.open(entry) as file:
                        while file.read(_BLOCK):
                            pass
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError):
        # A damaged header may ask for a compression, a version or a key that zipfile does not have.
        return False
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder given to --save, or one")


def run(args: argparse.Namespace) -> None:
    """Print what is found.

    Raises:
        UserError: the checkpoint is damaged.
    """
    report = examine_iteration(args.checkpoint)
    print("\n".join(report.lines()))
    if report.problems:
        raise UserError(
            f"{report.folder} is damaged: {len(report.problems)} problem(s); "
            f"{advise_earlier_iteration(report.folder, '--load')}"
        )
    print("whole")
