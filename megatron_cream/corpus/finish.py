# SPDX-License-Identifier: Apache-2.0
"""All parts of a job to the files of its dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.assemble import assemble, first_copies, part_segment, write_hashes
from megatron_cream.corpus.job import Job
from megatron_cream.corpus.note import DUPLICATES, FINGERPRINT, Counts, make_note
from megatron_cream.corpus.readers import lines_before, place
from megatron_cream.corpus.settings import PreprocessConfig
from megatron_cream.corpus.statistics import Lengths, median
from megatron_cream.corpus.storage import LISTED_ERRORS, Part, finished_parts
from megatron_cream.corpus.work_folder import WorkFolder
from megatron_cream.data.indexed import read_index
from megatron_cream.data.metadata import check_fits, read_metadata
from megatron_cream.errors import UserError


def finish(config: PreprocessConfig, job: Job, units: list[int], folder: WorkFolder) -> None:
    """Make the files of the dataset, at ``folder.staged``, out of all parts.

    Raises:
        UserError: a part is missing, a bad record is one too many, or no document is left.
        OSError: they cannot be written.
    """
    dtype = np.dtype(job.dtype)
    parts = [part for unit in units for part in finished_parts(folder.path, unit, dtype)]
    if len({part.unit for part in parts if part.note.next is None}) != len(units):
        raise UserError(f"--output-prefix {job.prefix}: {folder.path} lost parts, start again")
    counts = _counts(job, parts)
    head, tail = int(job.bos is not None), int(job.eod is not None)
    segments = [part_segment(part, job.max_split, head, tail) for part in parts]
    kept = first_copies(segments) if job.drop_duplicates else None
    if kept is not None:
        counts.add({DUPLICATES: int((~kept).sum())}, {})
    lengths, documents = assemble(folder.staged, dtype, segments, kept, config.thresholds())
    if not documents and job.shard[1] == 1:
        folder.remove()
        raise UserError(_nothing_left(config, counts))
    shard: dict[str, Any] = {}
    if job.shard[1] > 1:
        shard = {
            "shard": list(job.shard),
            "job": job.digest(),
            "thresholds": lengths.thresholds,
            "drop_duplicates": job.drop_duplicates,
        }
        if kept is not None:
            write_hashes(folder.staged + ".hashes", segments, kept)
    middle = median(read_index(folder.staged, empty=True).lengths)
    settings = {**config.noted(job), FINGERPRINT: job.fingerprint(config.thresholds()), **shard}
    note = make_note(settings, lengths, documents, middle, counts)
    Path(folder.staged + ".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def is_dataset_of(job: Job, thresholds: tuple[int, ...]) -> bool:
    """Say whether the files at the job's prefix are what this job makes: all there, and whole."""
    try:
        note = read_metadata(job.prefix)
        if note is None or tuple(note.get("shard", (0, 1))) != job.shard:
            return False
        wanted = job.fingerprint(thresholds)
        complete = set(make_note({}, Lengths(), 0, 0.0, Counts())) <= set(note)
        if wanted is None or note.get(FINGERPRINT) != wanted or not complete:
            return False
        check_fits(read_index(job.prefix, empty=True), note)
    except (UserError, FileNotFoundError):
        return False
    return True


def _counts(job: Job, parts: list[Part]) -> Counts:
    """Add up what the parts left out, naming bad records by their line in the file."""
    counts = Counts({"shorter_than_min_tokens": 0, "longer_than_max_tokens": 0, DUPLICATES: 0})
    for part in parts:
        note = part.note
        dropped = {"shorter_than_min_tokens": note.shorter, "longer_than_max_tokens": note.longer}
        counts.add(dropped, note.errors)
        counts.longest = max(counts.longest, note.longest)
    counts.list_errors(_listed(job, parts))
    if counts.errors and job.on_error == "fail":
        raise UserError(": ".join(counts.listed[0]))
    return counts


def _listed(job: Job, parts: list[Part]) -> list[list[str]]:
    """Place and reason of the first bad records, counting the lines of each file once."""
    every = [(job.units[part.unit][bad[0]], *bad[1:]) for part in parts for bad in part.note.listed]
    every = every[:LISTED_ERRORS]
    starts: dict[str, set[int]] = {}
    for piece, *_ in every:
        if piece.start:
            starts.setdefault(piece.path, set()).add(piece.start)
    before = {
        (path, start): lines
        for path, found in starts.items()
        for start, lines in zip(sorted(found), lines_before(path, sorted(found)), strict=True)
    }
    return [
        [place(piece, before.get((piece.path, piece.start), 0) + number), f"{kind}: {detail}"]
        for piece, number, kind, detail in every
    ]


def _nothing_left(config: PreprocessConfig, counts: Counts) -> str:
    given = " ".join(config.input)
    if not counts.longest:
        bad = sum(counts.errors.values())
        found = f" ({bad} bad records)" if bad else ""
        return f"--input {given}: holds no text{found}, needs one document that is not empty"
    short = counts.dropped["shorter_than_min_tokens"]
    if short:
        return (
            f"--min-tokens {config.min_tokens}: none of the {short} documents is left, needs at "
            f"most {counts.longest}, the tokens of the longest"
        )
    return f"--max-tokens {config.max_tokens}: all documents are longer, needs more, or to split"
