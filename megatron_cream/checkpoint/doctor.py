# SPDX-License-Identifier: Apache-2.0
"""Reads one checkpoint whole and says what is damaged, in the time of reading it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_cream.checkpoint import checksums
from megatron_cream.checkpoint.integrity import go_on_before, problems
from megatron_cream.checkpoint.iterations import (
    folder_named,
    is_iteration,
    read_tracker,
    without_tracker,
)
from megatron_cream.checkpoint.section import Section
from megatron_cream.checkpoint.torch_dist_reader import data_start
from megatron_cream.checkpoint.torch_dist_table import Place, Table, read_table
from megatron_cream.errors import UserError

_MEGATRONS = "integrity.json"  # of --verify-integrity
_BLOCK = 4 << 20

EXAMPLES = """
    megatron-cream doctor runs/cream                  # the latest iteration
    megatron-cream doctor runs/cream/iter_0000010     # one of them

Sizes, every record, and the checksums that megatron_cream writes when it saves; a checkpoint of
another trainer has those in its records. Nothing in the checkpoint is run.
"""


@dataclass(frozen=True)
class Report:
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
        """Return what to tell."""
        head = f"{self.folder}: {self.records} records, {self.nbytes / 1e9:.2f} GB"
        rest = self.files - self.summed
        compared = f"{self.summed} of {self.files} files compared with the checksum of their save"
        beside = "; of the others, records with a checksum in them were compared with that"
        return [head, compared + (beside if rest else ""), *self.problems]


def examine(path: str) -> Report:
    """Read one iteration whole: sizes, every record, and checksums where there are any.

    No code from the checkpoint runs.

    Args:
        path: folder given to --save, of which the latest iteration is taken, or one iteration.

    Raises:
        UserError, FileNotFoundError: there is no checkpoint.
    """
    folder = _iteration(path)
    found = list(problems(folder))
    sums, wrong = checksums.read(folder)
    wrong += checksums.differences(folder, sums, sums)
    table = None
    try:
        table = read_table(folder)
    except (UserError, OSError):
        names = {file.name for file in folder.glob("*.distcp")}  # said already
    else:
        names = set(table.ends())
    names |= {name for name in (".metadata", "metadata.json") if (folder / name).is_file()}
    hashed, differing = _megatrons(folder, sums)
    wrong += differing
    if table is not None and not found:
        wrong += _wrong_records(table, sums.keys() | hashed)
    nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    summed = len(names & (sums.keys() | hashed))
    told = tuple(dict.fromkeys([*found, *wrong]))
    return Report(folder, nbytes, len(table.records) if table else 0, summed, len(names), told)


def _iteration(path: str) -> Path:
    root = Path(path)
    name = read_tracker(root)
    folder = root if name is None else folder_named(root, name)
    if name is None and (error := without_tracker(root)):
        raise error
    if name is None and not is_iteration(folder) and not any(folder.glob("*.distcp")):
        raise FileNotFoundError(f"CHECKPOINT is {path}: it must hold a torch_dist checkpoint")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: the tracker file in {root} names it")
    return folder


def _megatrons(folder: Path, sums: dict[str, checksums.Sum]) -> tuple[set[str], list[str]]:
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


def _wrong_records(table: Table, summed: set[str]) -> list[str]:
    """Read the records of all files, those without a checksum of their own with that in them."""
    by_file: dict[str, list[Place]] = {}
    for place, record in table.records.items():
        by_file.setdefault(record.file, []).append(place)
    chunks = {
        (key, tuple(chunk.offsets)): chunk
        for key, entry in table.tensors.items()
        for chunk in entry.chunks
    }
    look = partial(_wrong_in_file, table, chunks, summed)
    with ThreadPoolExecutor() as pool:
        return [line for lines in pool.map(look, by_file.items()) for line in lines]


def _wrong_in_file(
    table: Table, chunks: dict, summed: set[str], item: tuple[str, list[Place]]
) -> list[str]:
    name, places = item
    descriptor = os.open(table.folder / name, os.O_RDONLY)
    try:
        return [
            line
            for place in sorted(places, key=lambda place: table.records[place].start)
            for line in _wrong_record(table, chunks, place, descriptor, name not in summed)
        ]
    finally:
        os.close(descriptor)


def _wrong_record(
    table: Table, chunks: dict, place: Place, descriptor: int, compare: bool
) -> Iterator[str]:
    record = table.records[place]
    called = f"{table.folder / record.file}: {place[0]}"
    section = Section(descriptor, record.start, record.length)
    if place in chunks and not record.transformed:
        try:
            data_start(section, chunks[place], table.tensors[place[0]].properties.dtype, called)
        except UserError as error:
            yield str(error)
            return
    if compare and not _record_fits(section.rewound()):
        yield f"{called} is damaged: its bytes do not fit the checksum in the record"


def _record_fits(section: Section) -> bool:
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
    report = examine(args.checkpoint)
    print("\n".join(report.lines()))
    if report.problems:
        raise UserError(
            f"{report.folder} is damaged: {len(report.problems)} problem(s); "
            f"{go_on_before(report.folder, '--load')}"
        )
    print("whole")
