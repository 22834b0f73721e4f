# SPDX-License-Identifier: Apache-2.0
"""Turns text into a Megatron indexed dataset: `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

A job is cut into parts by bytes of input. Workers write parts into `PREFIX.parts`; when all are
there they are put in a row and moved into place. A job that was ended in any way goes on with the
parts it has. Nothing here imports megatron.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream.corpus.assemble import assemble, first_copies, part_segment, write_hashes
from megatron_cream.corpus.engine import choose_engine, sample_texts
from megatron_cream.corpus.executors import run_units, use_one_thread
from megatron_cream.corpus.job import InputFile, PreprocessJob
from megatron_cream.corpus.readers import STDIN, TextInputs, lines_before, place
from megatron_cream.corpus.settings import PreprocessConfig, config_from, plan_job
from megatron_cream.corpus.settings import add_arguments as add_arguments
from megatron_cream.corpus.statistics import (
    DUPLICATES,
    FINGERPRINT,
    Counts,
    Lengths,
    draw_histogram,
    make_metadata,
    median,
)
from megatron_cream.corpus.storage import LISTED_ERRORS, EncodedPart, finished_parts
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.corpus.work_folder import (
    PREPROCESSING,
    SUFFIXES,
    WorkFolder,
    finish_publishing,
    publish,
    validate_absent,
)
from megatron_cream.data.indexed import (
    read_index,
    read_metadata,
    validate_metadata,
)
from megatron_cream.errors import UserError

__all__ = ["PreprocessConfig", "PreprocessStats", "preprocess"]

EXAMPLES = """
    megatron-cream preprocess --input corpus/ more.jsonl.zst 'web/*.parquet' \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer/ --append-eod \\
        --workers 8 --output-prefix data/train

A job that was killed continues when it is started again with the same settings. As a Slurm array,
with --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, then megatron-cream merge.
See docs/data.md.
"""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class PreprocessStats:
    """What a job did. Lengths are in tokens as written, eod and bos included.

    Attributes:
        note: the content of `PREFIX.json`.
        skipped_files: files of folders that were not taken.
        input_bytes: read from disk.
        seconds: this process took, without what was finished before it started.
        files: that were written.
        finished_before: whether this very job had been done by an earlier process.
    """

    note: dict[str, Any]
    skipped_files: int
    input_bytes: int
    seconds: float
    files: tuple[str, ...]
    finished_before: bool = False

    @property
    def documents(self) -> int:
        """Documents written."""
        return self.note["documents"]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.note["tokens"]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document written."""
        return self.note["longest_document"]

    @property
    def _speed(self) -> float:
        return self.input_bytes / 1e6 / self.seconds

    def summary(self) -> str:
        """Lines for a person; MB/s is in bytes of input read, 10**6 to the MB."""
        note = self.note
        dropped = ", ".join(f"{count} {why}" for why, count in note["dropped"].items() if count)
        errors = ", ".join(f"{count} {kind}" for kind, count in note["errors"].items())
        shares = (f"{share:.1%} of {n}" for n, share in note["share_at_least"].items())
        lines = [
            f"documents: {note['documents']}",
            f"tokens: {note['tokens']}",
            f"dropped: {dropped.replace('_', ' ') or 'none'}",
            f"bad records: {errors or 'none'}",
            f"left out: {self.skipped_files} files of other kinds",
            f"tokens per document: mean {note['mean_document']:.1f}, "
            f"median {note['median_document']:.1f}, longest {note['longest_document']}",
            draw_histogram(note["documents_by_length"]),
            f"documents of at least so many tokens: {', '.join(shares)}",
            "" if self.finished_before else f"speed: {self._speed:.2f} MB/s",
            f"{'finished before' if self.finished_before else 'written'}: {' '.join(self.files)}",
        ]
        return "\n".join(line for line in lines if line and not line.endswith("tokens: "))


def preprocess(
    config: PreprocessConfig,
    *,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> PreprocessStats:
    """Tokenize the input documents, one sequence each, into an indexed dataset.

    The files appear whole or not at all, and are the same bytes for every number of workers, shards
    and interruptions. With two or more workers a script must call this under
    `if __name__ == "__main__":`, since they may be fresh interpreters.

    Args:
        config: the job.
        progress: whether to show a bar on stderr, in bytes of input read.
        say: called with a line for a person at each step that is worth one.

    Raises:
        UserError: a setting that cannot work, broken input, or no document left.
        OSError: a file that is missing or exists, cannot be read or written, a full disk, another
            process at the same output, or a worker that died (`ChildProcessError`).
    """
    started = time.perf_counter()
    job, tokenizer, inputs = plan_job(config)
    with WorkFolder(job.prefix, PREPROCESSING) as folder, use_one_thread():
        try:
            finished = _finished_before(folder, job, config)
            if not finished:
                validate_absent(job.prefix, config.overwrite)
                _run_job(config, job, tokenizer, inputs, folder, progress, say)
        except OSError as exc:
            if exc.errno in _FULL:
                raise OSError(
                    f"--output-prefix {job.prefix}: {os.strerror(exc.errno)}, needs room; start "
                    f"again to continue with what is in {folder.path}"
                ) from exc
            raise
        folder.remove()
    files = tuple(job.prefix + s for s in SUFFIXES if os.path.exists(job.prefix + s))
    note = read_metadata(job.prefix)
    seconds = time.perf_counter() - started
    return PreprocessStats(note, inputs.skipped, inputs.total_bytes, seconds, files, finished)


def _finished_before(folder: WorkFolder, job: PreprocessJob, config: PreprocessConfig) -> bool:
    """Say whether this very job is done, after moving into place what a killed process left."""
    if folder.is_whole():
        own = folder.is_of(job)
        finish_publishing(folder.staged, job.prefix)
        if own:
            return is_dataset_of(job, config.thresholds())
    return not config.overwrite and is_dataset_of(job, config.thresholds())


def _run_job(
    config: PreprocessConfig,
    job: PreprocessJob,
    tokenizer: Tokenizer,
    inputs: TextInputs,
    folder: WorkFolder,
    progress: bool,
    say: Callable[[str], object],
) -> None:
    done = folder.claim(job, restart=config.restart)
    if done:
        say(f"continuing with {done} finished parts in {folder.path}")
    pieces = [piece for unit in job.units for piece in unit]
    texts = sample_texts(pieces, job.fields, config.verify if config.verify >= 0 else 0)
    fast, reason = choose_engine(config.engine, tokenizer, texts)
    say(reason)
    say(_describe_added_tokens(tokenizer, job))
    job = replace(job, fast=None if fast is None else fast.source)
    units = job.own_units()
    for unit in units:
        if any(piece.path == str(STDIN) for piece in job.units[unit]):
            folder.drop_unit(unit)
    with _Bar(total=_bytes_of(job, units), unit="B", unit_scale=True, disable=not progress) as bar:
        if config.ray is None:
            run_units(job, units, config.workers, bar.update, fast or tokenizer, folder.release)
        else:
            from megatron_cream.corpus.executors import run_on_ray

            run_on_ray(job, units, config.ray, bar.update)
    _validate_unchanged(job)
    build_dataset(config, job, units, folder)
    publish(folder.staged, job.prefix, config.overwrite)


class _Bar(tqdm):
    """A bar without a thread of its own: workers are forked only from a process of one."""

    monitor_interval = 0


def _bytes_of(job: PreprocessJob, units: list[int]) -> int:
    return sum(job.unit_size(unit) for unit in units)


def _describe_added_tokens(tokenizer: Tokenizer, job: PreprocessJob) -> str:
    """Say what is put around a document, since a model is trained with one rule or the other."""
    head = "no bos" if job.bos is None else f"bos {job.bos}"
    tail = "no eod" if job.eod is None else f"eod {job.eod}"
    wanted = getattr(tokenizer, "template", "")
    note = f"; the tokenizer's own template is {wanted}" if wanted else ""
    return f"each document: {head}, its tokens, {tail}{note}"


def _validate_unchanged(job: PreprocessJob) -> None:
    """Refuse parts of a file that became another one while it was read."""
    for file in job.files:
        if file != InputFile.of(Path(file.path), file.format):
            raise UserError(
                f"--input {file.path}: changed while it was read, needs to stay as it is; start "
                "again with --restart"
            )


def build_dataset(
    config: PreprocessConfig, job: PreprocessJob, units: list[int], folder: WorkFolder
) -> None:
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
    note = make_metadata(settings, lengths, documents, middle, counts)
    Path(folder.staged + ".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def is_dataset_of(job: PreprocessJob, thresholds: tuple[int, ...]) -> bool:
    """Say whether the files at the job's prefix are what this job makes: all there, and whole."""
    try:
        note = read_metadata(job.prefix)
        if note is None or tuple(note.get("shard", (0, 1))) != job.shard:
            return False
        wanted = job.fingerprint(thresholds)
        complete = set(make_metadata({}, Lengths(), 0, 0.0, Counts())) <= set(note)
        if wanted is None or note.get(FINGERPRINT) != wanted or not complete:
            return False
        validate_metadata(read_index(job.prefix, empty=True), note)
    except (UserError, FileNotFoundError):
        return False
    return True


def _counts(job: PreprocessJob, parts: list[EncodedPart]) -> Counts:
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


def _listed(job: PreprocessJob, parts: list[EncodedPart]) -> list[list[str]]:
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


def run(args: argparse.Namespace) -> None:
    """Run the job of a command line, and print what it did."""
    # Without a handler a termination would leave worker processes to find out by themselves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        stats = preprocess(
            config_from(args), say=lambda line: print(line, file=sys.stderr, flush=True)
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("start again to continue") from None
    print(stats.summary())
