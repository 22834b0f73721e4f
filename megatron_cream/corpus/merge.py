# SPDX-License-Identifier: Apache-2.0
"""Merges datasets into one: the shards of a job, or any that were written with one tokenizer.

Duplicates are found by the hashes of documents, in bounded memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream import ownership
from megatron_cream.corpus.inspection import (
    COUNTED_KEYS,
    DUPLICATES,
    FINGERPRINT,
    Counts,
    write_metadata,
)
from megatron_cream.corpus.storage import (
    HASH_BYTES,
    MERGING,
    Segment,
    WorkFolder,
    assemble,
    validate_absent,
)
from megatron_cream.data.indexed import (
    MASK_SUFFIX,
    DatasetFiles,
    DatasetIndex,
    check_mask,
    check_tokens,
    read_index,
)
from megatron_cream.errors import UserError

_BUCKET_BYTES = 256 << 20  # of memory, for hashes
_HASHED_BYTES = 64  # with what sorting them takes
_OF_A_JOB = ("shard", "job", "thresholds", "drop_duplicates")
_OF_A_MASK = ("mask_bytes", "trained_tokens")
_SAME = ("tokenizer_type", "vocab_size", "eod_id", "bos_id", "appended_eod", "prepended_bos")

EXAMPLES = """
    megatron-cream merge --input data/train-*-of-00008.idx --output-prefix data/train

Shards are checked to be all there and put in order; other datasets keep the order they are given.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream merge``."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="with or without .idx or .bin")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")


def run(args: argparse.Namespace) -> None:
    """Merge the datasets that the command line names, and say how many documents there are."""
    prefixes = [name.removesuffix(".idx").removesuffix(".bin") for name in args.input]
    print(merge_datasets(prefixes, args.output_prefix, overwrite=args.overwrite))


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
        folder.finish_publishing()
        finished = not overwrite and _is_merged(prefixes, output)
        if not finished:
            validate_absent(output, overwrite)
            _write(_read(prefixes), folder.staged)
            folder.publish(overwrite)
        folder.remove()
    index = read_index(output)
    done = "finished before" if finished else "written"
    return (
        f"documents: {len(index.documents) - 1}\ntokens: {index.tokens}\n{done}: {output}.bin .idx"
    )


@dataclass(frozen=True)
class InputDataset:
    """A dataset to merge; ``metadata`` is empty where another tool wrote it."""

    files: DatasetFiles
    metadata: dict[str, Any]

    @classmethod
    def read(cls, prefix: str) -> InputDataset:
        """Read index and metadata.

        Raises:
            UserError: a file is damaged, or they are not of one dataset.
        """
        files = DatasetFiles.open(prefix, empty=True)
        found = files.metadata or {}
        missing = {"shard", "job", "thresholds"} - set(found)
        if "shard" in found and missing:
            raise UserError(f"{prefix}.json has a shard and no {min(missing)}, needs both")
        return cls(files, found)

    @property
    def index(self) -> DatasetIndex:
        """What its ``.idx`` says."""
        return self.files.index

    @property
    def prefix(self) -> str:
        """Its path without suffix."""
        return self.index.prefix

    def segment(self) -> Segment:
        """The dataset as a stretch of the one to be."""
        counts = np.diff(self.index.documents)
        return Segment(
            self.prefix + ".bin",
            len(counts),
            lambda: (self.index.lengths.astype(np.int64), counts),
            self._hashes,
            self.prefix + MASK_SUFFIX if self.files.masked else None,
        )

    def _hashes(self) -> np.ndarray:
        path = self.prefix + ".hashes"
        size, needed = os.path.getsize(path), (len(self.index.documents) - 1) * HASH_BYTES
        if size != needed:
            raise UserError(f"{path} has {size} bytes, needs {needed}, a hash for each document")
        kind = f"V{HASH_BYTES}"
        return np.memmap(path, mode="r", dtype=kind) if size else np.empty(0, kind)


def _validate_arguments(prefixes: Sequence[str], output: str) -> None:
    ownership.validate_prefix(output)
    where = f"--output-prefix {output}"
    for prefix in prefixes:
        if not os.path.basename(prefix):
            raise UserError(f"--input {prefix!r}: names no dataset, needs its path without suffix")
        if os.path.realpath(prefix + ".bin") == os.path.realpath(output + ".bin"):
            raise UserError(f"{where}: {prefix} is an input, needs another prefix")
        ownership.validate_outside(prefix + ".bin", Path(output + ".parts"), where)


def _is_merged(prefixes: Sequence[str], output: str) -> bool:
    """Return whether ``output`` is what these shards make: all of one job, that of its metadata.

    Datasets of several jobs have no fingerprint in common, so that nothing says whether it is.
    """
    try:
        datasets = [InputDataset.read(prefix) for prefix in prefixes]
        merged = InputDataset.read(output)
        fingerprints = {found.metadata.get(FINGERPRINT) for found in (merged, *datasets)}
        if len(fingerprints) > 1 or None in fingerprints or "shard" in merged.metadata:
            return False
        if not all("shard" in found.metadata for found in datasets):
            return False
        _in_order(datasets, len(datasets))
    except (UserError, FileNotFoundError):
        return False
    return True


def _read(prefixes: Sequence[str]) -> list[InputDataset]:
    """Return the datasets, checked whole: what is damaged must not go on under another name."""
    datasets = [InputDataset.read(prefix) for prefix in prefixes]
    first = datasets[0]
    for other in datasets[1:]:
        if other.index.dtype != first.index.dtype:
            raise UserError(
                f"--input {other.prefix}: holds {other.index.dtype}, needs "
                f"{first.index.dtype} as {first.prefix}"
            )
        for key in _SAME if first.metadata and other.metadata else ():
            if first.metadata[key] != other.metadata[key]:
                raise UserError(
                    f"--input {other.prefix}: has {key} {other.metadata[key]!r}, needs "
                    f"{first.metadata[key]!r} as {first.prefix}"
                )
    sharded = [found for found in datasets if "shard" in found.metadata]
    datasets = _in_order(sharded, len(datasets)) if sharded else datasets
    for found in datasets:
        if len(found.index.lengths):
            check_tokens(found.index, found.metadata.get("vocab_size"))
        if found.files.masked:
            check_mask(found.prefix)
    return datasets


def _in_order(shards: list[InputDataset], given: int) -> list[InputDataset]:
    """Return the shards of one job by their number."""
    count = shards[0].metadata["shard"][1]
    numbers = sorted(shard.metadata["shard"][0] for shard in shards)
    if len({shard.metadata["job"] for shard in shards}) > 1 or len(shards) != given:
        raise UserError(
            "--input: shards go together with all other shards of the same job (the same settings "
            "and input files), and nothing else"
        )
    if numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(numbers))
        what = f"without {missing}" if missing else "with one given twice"
        raise UserError(f"--input: shards {numbers} of {count}, {what}, needs each of them once")
    return sorted(shards, key=lambda shard: shard.metadata["shard"][0])


def _write(datasets: list[InputDataset], staged: str) -> None:
    segments = [found.segment() for found in datasets]
    kept = first_copies(segments, os.path.dirname(staged)) if _have_hashes(datasets) else None
    described = [found.metadata for found in datasets if found.metadata]
    whole = len(described) == len(datasets)
    if not assemble(staged, datasets[0].index.dtype, segments, kept):
        raise UserError("--input: the datasets hold no document together, needs one that does")
    if not whole:
        return
    counts, thresholds = Counts(), described[0].get("thresholds", ())
    for found in described:
        counts.add(found["dropped"], found.get("errors", {}))
        counts.list_errors(found.get("listed_errors", []))
    if kept is not None:
        counts.add({DUPLICATES: int((~kept).sum())}, {})
    write_metadata(staged, _common_settings(described), counts, thresholds)


def _have_hashes(datasets: list[InputDataset]) -> bool:
    """Return whether duplicates are dropped: where the job of all shards asked for it."""
    there = [os.path.exists(found.prefix + ".hashes") for found in datasets]
    asked = any(found.metadata.get("drop_duplicates") for found in datasets)
    if (asked or any(there)) and not all(there):
        without = datasets[there.index(False)].prefix
        raise UserError(
            f"--input {without}: there is no {without}.hashes, needs it to find duplicates across "
            "shards, as --drop-duplicates asked"
        )
    return all(there)


def _common_settings(described: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the first says of tokenizer and limits, None where another says otherwise."""
    counted = COUNTED_KEYS | {*_OF_A_JOB, *_OF_A_MASK}
    if "shard" not in described[0]:  # datasets in a row are those of no job
        counted |= {FINGERPRINT}
    return {
        key: value if all(found.get(key) == value for found in described) else None
        for key, value in described[0].items()
        if key not in counted
    }


_HASHED = np.dtype([("first", "<u8"), ("second", "<u8"), ("place", "<i8")])


def first_copies(segments: Sequence[Segment], folder: str) -> np.ndarray:
    """Return bool ``[documents]`` of all segments: whether no earlier document is the same.

    Hashes are read once. Where they are too many for memory they are dealt out to files in
    ``folder`` by their first bits, and looked at a file at a time. That takes 24 bytes per document
    on the disk, which are free again at the end, and a byte per document in memory.
    """
    total = sum(segment.documents for segment in segments)
    first = np.ones(total, dtype=bool)
    parts = -(-total * _HASHED_BYTES // _BUCKET_BYTES)
    if parts < 2:
        _distinct(first, np.concatenate(list(_batches(segments))))
        return first
    borders = np.array([(part << 64) // parts for part in range(1, parts)], dtype=np.uint64)
    with tempfile.TemporaryDirectory(prefix="hashes-", dir=folder) as scratch:
        paths = [os.path.join(scratch, str(part)) for part in range(parts)]
        for batch in _batches(segments):
            rows = _distinct(first, batch)
            dealt = np.split(rows, np.searchsorted(rows["first"], borders))
            for path, part in zip(paths, dealt, strict=True):
                with open(path, "ab") as file:
                    file.write(part.data)
        for path in paths:
            _distinct(first, np.fromfile(path, _HASHED))
            os.unlink(path)
    return first


def _batches(segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Yield the hashes of all documents with their places, in order, so many as memory holds."""
    most = max(_BUCKET_BYTES // _HASHED_BYTES // 4, 1)
    waiting: list[np.ndarray] = [np.empty(0, f"V{HASH_BYTES}")]
    place = count = 0
    for segment in segments:
        hashes = segment.hashes()
        for at in range(0, len(hashes), most):
            waiting.append(hashes[at : at + most])
            count += len(waiting[-1])
            if count >= most:
                yield _hashed(waiting, place)
                place, count, waiting = place + count, 0, waiting[:1]
    yield _hashed(waiting, place)


def _hashed(hashes: Sequence[np.ndarray], place: int) -> np.ndarray:
    """Return hashes with the numbers of their documents, of which the first is ``place``."""
    pairs = np.concatenate(hashes).view("<u8").reshape(-1, 2)
    rows = np.empty(len(pairs), _HASHED)
    rows["first"], rows["second"] = pairs.T
    rows["place"] = np.arange(place, place + len(rows))
    return rows


def _distinct(first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows by hash without copies of earlier ones, which become False in ``first``."""
    rows = rows[np.argsort(rows["first"], kind="stable")]  # which keeps equal ones in order
    near, equal = (rows[half][1:] == rows[half][:-1] for half in ("first", "second"))
    if (near & ~equal).any():  # half a hash in common: by chance, so sorting whole ones is rare
        rows = rows[np.lexsort((rows["second"], rows["first"]))]
        near, equal = (rows[half][1:] == rows[half][:-1] for half in ("first", "second"))
    copies = np.concatenate(([False], near & equal))[: len(rows)]
    first[rows["place"][copies]] = False
    return rows[~copies]
