# SPDX-License-Identifier: Apache-2.0
"""Merges datasets into one: the shards of a job, or any that were written with one tokenizer."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream import ownership
from megatron_cream.corpus.assemble import Segment, assemble, first_copies
from megatron_cream.corpus.statistics import (
    DUPLICATES,
    FINGERPRINT,
    Counts,
    Lengths,
    make_metadata,
    median,
)
from megatron_cream.corpus.storage import HASH_BYTES
from megatron_cream.corpus.work_folder import (
    MERGING,
    WorkFolder,
    finish_publishing,
    publish,
    validate_absent,
    validate_prefix,
)
from megatron_cream.data.indexed import (
    DatasetIndex,
    check_tokens,
    read_index,
    read_metadata,
    validate_metadata,
)
from megatron_cream.errors import UserError

_OF_A_JOB = ("shard", "job", "thresholds", "drop_duplicates")
_SAME = ("tokenizer_type", "vocab_size", "eod_id", "bos_id", "appended_eod", "prepended_bos")

EXAMPLES = """
    megatron-cream merge --input data/train-*-of-00008.idx --output-prefix data/train

Shards are checked to be all there and put in order; other datasets keep the order they are given.
"""


@dataclass(frozen=True)
class InputDataset:
    """A dataset to merge: its index, and its note, None where another tool wrote it."""

    index: DatasetIndex
    note: dict[str, Any] | None

    @property
    def prefix(self) -> str:
        """Its path without suffix."""
        return self.index.prefix

    def segment(self, *, hashed: bool) -> Segment:
        """The dataset as a stretch of the one to be."""
        counts = np.diff(self.index.documents)
        return Segment(
            self.prefix + ".bin",
            len(counts),
            lambda: (self.index.lengths.astype(np.int64), counts),
            self._hashes if hashed else None,
        )

    def _hashes(self) -> np.ndarray:
        path = self.prefix + ".hashes"
        size, needed = os.path.getsize(path), (len(self.index.documents) - 1) * HASH_BYTES
        if size != needed:
            raise UserError(f"{path} has {size} bytes, needs {needed}, a hash for each document")
        return np.fromfile(path, dtype=f"V{HASH_BYTES}")


def merge_datasets(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> str:
    """Write the documents of all datasets, in order, as one; returns a line that says how many.

    Shards of one job give what the job gives in one piece, byte for byte: they must all be there,
    are put in order, and duplicates across them are dropped where the job asked for it. Where their
    whole dataset is at ``output`` already, it is left as it is.

    Raises:
        UserError: datasets that do not go together, a missing shard, a damaged dataset.
        OSError: a file that is missing, exists or cannot be written.
    """
    _validate_arguments(prefixes, output)
    with WorkFolder(output, MERGING) as folder:
        if folder.is_whole():
            finish_publishing(folder.staged, output)
        finished = not overwrite and _is_merged(prefixes, output)
        if not finished:
            validate_absent(output, overwrite)
            _write(_read(prefixes), folder.staged)
            publish(folder.staged, output, overwrite)
        folder.remove()
    index = read_index(output)
    tokens = index.lengths.sum(dtype=np.int64)
    done = "finished before" if finished else "written"
    return f"documents: {len(index.documents) - 1}\ntokens: {tokens}\n{done}: {output}.bin .idx"


def _is_merged(prefixes: Sequence[str], output: str) -> bool:
    """Say whether ``output`` is what these shards make: all of one job, the job of its note.

    Datasets of several jobs have no fingerprint in common, so that nothing says whether it is.
    """
    try:
        sources = [_read_one(prefix) for prefix in prefixes]
        merged = _read_one(output)
        notes = [source.note or {} for source in (merged, *sources)]
        fingerprints = {note.get(FINGERPRINT) for note in notes}
        if len(fingerprints) > 1 or None in fingerprints or "shard" in notes[0]:
            return False
        if not all("shard" in note for note in notes[1:]):
            return False
        _in_order(sources, len(sources))
    except (UserError, FileNotFoundError):
        return False
    return True


def _validate_arguments(prefixes: Sequence[str], output: str) -> None:
    validate_prefix(output)
    where = f"--output-prefix {output}"
    for prefix in prefixes:
        if not os.path.basename(prefix):
            raise UserError(f"--input {prefix!r}: names no dataset, needs its path without suffix")
        if os.path.realpath(prefix + ".bin") == os.path.realpath(output + ".bin"):
            raise UserError(f"{where}: {prefix} is an input, needs another prefix")
        ownership.validate_outside(prefix + ".bin", Path(output + ".parts"), where)


def _read(prefixes: Sequence[str]) -> list[InputDataset]:
    """Return the datasets, checked whole: what is damaged must not go on under another name."""
    sources = [_read_one(prefix) for prefix in prefixes]
    first = sources[0]
    for source in sources[1:]:
        if source.index.dtype != first.index.dtype:
            raise UserError(
                f"--input {source.prefix}: holds {source.index.dtype}, needs "
                f"{first.index.dtype} as {first.prefix}"
            )
        _validate_same_tokenizer(first, source)
    sharded = [source for source in sources if source.note and "shard" in source.note]
    sources = _in_order(sharded, len(sources)) if sharded else sources
    for source in sources:
        if len(source.index.lengths):
            check_tokens(source.index, None if source.note is None else source.note["vocab_size"])
    return sources


def _read_one(prefix: str) -> InputDataset:
    source = InputDataset(read_index(prefix, empty=True), read_metadata(prefix))
    validate_metadata(source.index, source.note)
    missing = {"shard", "job", "thresholds"} - set(source.note or ())
    if source.note and "shard" in source.note and missing:
        raise UserError(f"{prefix}.json has a shard and no {min(missing)}, needs both")
    return source


def _validate_same_tokenizer(first: InputDataset, other: InputDataset) -> None:
    if first.note is None or other.note is None:
        return
    for key in _SAME:
        if first.note[key] != other.note[key]:
            raise UserError(
                f"--input {other.prefix}: has {key} {other.note[key]!r}, needs "
                f"{first.note[key]!r} as {first.prefix}"
            )


def _in_order(shards: list[InputDataset], given: int) -> list[InputDataset]:
    """The shards of one job by their number."""
    count = shards[0].note["shard"][1]
    jobs = {shard.note["job"] for shard in shards}
    numbers = sorted(shard.note["shard"][0] for shard in shards)
    if len(jobs) > 1 or len(shards) != given:
        raise UserError(
            "--input: shards go together with all other shards of the same job (the same settings "
            "and input files), and nothing else"
        )
    if numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        what = f"without {missing}" if missing else "with one given twice"
        raise UserError(f"--input: shards {numbers} of {count}, {what}, needs each of them once")
    return sorted(shards, key=lambda shard: shard.note["shard"][0])


def _write(sources: list[InputDataset], staged: str) -> None:
    hashed = _have_hashes(sources)
    segments = [source.segment(hashed=hashed) for source in sources]
    kept = first_copies(segments) if hashed else None
    notes = [source.note for source in sources if source.note is not None]
    whole = len(notes) == len(sources)
    thresholds = tuple(notes[0].get("thresholds", ())) if whole else ()
    dtype = sources[0].index.dtype
    lengths, documents = assemble(staged, dtype, segments, kept, thresholds)
    if not documents:
        raise UserError("--input: the datasets hold no document together, needs one that does")
    if not whole:
        return
    counts = Counts()
    for note in notes:
        counts.add(note["dropped"], note.get("errors", {}))
        counts.list_errors(note.get("listed_errors", []))
    if kept is not None:
        counts.add({DUPLICATES: int((~kept).sum())}, {})
    content = make_metadata(
        _settings(notes), lengths, documents, median(read_index(staged).lengths), counts
    )
    Path(staged + ".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _have_hashes(sources: list[InputDataset]) -> bool:
    """Whether duplicates are dropped: where the job of all shards asked for it."""
    there = [os.path.exists(source.prefix + ".hashes") for source in sources]
    asked = any(source.note and source.note.get("drop_duplicates") for source in sources)
    if (asked or any(there)) and not all(there):
        without = sources[there.index(False)].prefix
        raise UserError(
            f"--input {without}: there is no {without}.hashes, needs it to find duplicates across "
            "shards, as --drop-duplicates asked"
        )
    return all(there)


def _settings(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first note says of tokenizer and limits, those that all have in common."""
    made = set(make_metadata({}, Lengths(), 0, 0.0, Counts())) | set(_OF_A_JOB)
    if "shard" not in notes[0]:  # datasets in a row are those of no job
        made.add(FINGERPRINT)
    return {
        key: value if all(note.get(key) == value for note in notes) else None
        for key, value in notes[0].items()
        if key not in made
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="with or without .idx or .bin")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")


def run(args: argparse.Namespace) -> None:
    """Merge what a command line names."""
    prefixes = [name.removesuffix(".idx").removesuffix(".bin") for name in args.input]
    print(merge_datasets(prefixes, args.output_prefix, overwrite=args.overwrite))
