# SPDX-License-Identifier: Apache-2.0
"""Turns text into a Megatron indexed dataset: `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

Workers write the parts of a job into `PREFIX.parts`; when all are there they are put in a row and
moved into place. A job that was ended in any way goes on with the parts it has. Nothing here
imports megatron.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cream.corpus.assemble import build_dataset
from megatron_cream.corpus.executors import import_ray, run_on_ray, run_units, use_one_thread
from megatron_cream.corpus.gigatoken import EXCERPT_CHARACTERS, choose_engine
from megatron_cream.corpus.input_files import STDIN
from megatron_cream.corpus.inspection import COUNTED_KEYS, FINGERPRINT, draw_histogram
from megatron_cream.corpus.job import InputFile, PreprocessJob, plan_job
from megatron_cream.corpus.readers import read_span
from megatron_cream.corpus.records import BadRecord
from megatron_cream.corpus.settings import PreprocessConfig
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.corpus.work_folder import (
    PREPROCESSING,
    SUFFIXES,
    WorkFolder,
    validate_absent,
)
from megatron_cream.data.indexed import read_index, read_metadata, validate_metadata
from megatron_cream.data.token_mask import has_mask
from megatron_cream.errors import UserError
from megatron_cream.options import add_flags, read_flags

__all__ = ["PreprocessConfig", "PreprocessStats", "preprocess"]

EXAMPLES = """
    megatron-cream preprocess --input corpus/ more.jsonl.zst 'web/*.parquet' \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer/ --append-eod \\
        --workers 8 --output-prefix data/train

A job that was killed continues when it is started again with the same settings. As a Slurm array,
with --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, then megatron-cream merge.
See docs/data.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream preprocess``."""
    add_flags(parser, PreprocessConfig)
    every = "compare every document (default: as --verify says)"
    parser.add_argument("--verify-all", action="store_true", help=every)


def run(args: argparse.Namespace) -> None:
    """Run the job that the command line asks for, and print what it did."""
    args.verify = -1 if args.verify_all else args.verify
    config = read_flags(PreprocessConfig, args)
    # Without a handler a termination would leave worker processes to find out by themselves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        stats = preprocess(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("start again to continue") from None
    print(stats.summary())


@dataclass(frozen=True)
class PreprocessStats:
    """What a job did. Lengths are in tokens as written, eod and bos included.

    Attributes:
        metadata: the content of `PREFIX.json`.
        skipped_files: files of folders that were not taken.
        input_bytes: read from disk.
        seconds: this process took, without what was finished before it started.
        files: that were written.
        finished_before: whether this very job had been done by an earlier process.
    """

    metadata: dict[str, Any]
    skipped_files: int
    input_bytes: int
    seconds: float
    files: tuple[str, ...]
    finished_before: bool = False

    @property
    def documents(self) -> int:
        """Documents written."""
        return self.metadata["documents"]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.metadata["tokens"]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document written."""
        return self.metadata["longest_document"]

    @property
    def _speed(self) -> float:
        return self.input_bytes / 1e6 / self.seconds

    def summary(self) -> str:
        """Lines for a person; MB/s is in bytes of input read, 10**6 to the MB."""
        found = self.metadata
        dropped = ", ".join(f"{count} {why}" for why, count in found["dropped"].items() if count)
        errors = ", ".join(f"{count} {kind}" for kind, count in found["errors"].items())
        shares = (f"{share:.1%} of {n}" for n, share in found["share_at_least"].items())
        lines = [
            f"documents: {found['documents']}",
            f"tokens: {found['tokens']}",
            f"dropped: {dropped.replace('_', ' ') or 'none'}",
            f"bad records: {errors or 'none'}",
            f"left out: {self.skipped_files} files of other kinds",
            f"tokens per document: mean {found['mean_document']:.1f}, "
            f"median {found['median_document']:.1f}, longest {found['longest_document']}",
            draw_histogram(found["documents_by_length"]),
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

        preprocess(PreprocessConfig(input=("corpus/",), tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model="tokenizer/", append_eod=True, output_prefix="data/train"))

    Args:
        config: the job.
        progress: whether to show a bar on stderr, in bytes of input read.
        say: called with a line for a person at each step that is worth one.

    Returns:
        What the job did: documents, tokens, bytes read, seconds.

    Raises:
        UserError: a setting that cannot work, broken input, or no document left.
        OSError: a file that is missing or exists, cannot be read or written, a full disk, another
            process at the same output, or a worker that died (`ChildProcessError`).
    """
    started = time.perf_counter()
    if config.ray is not None:
        import_ray()  # said before anything is read
    job, tokenizer, inputs = plan_job(config)
    with WorkFolder(job.prefix, PREPROCESSING) as folder, use_one_thread(), _full_disk(folder):
        finished = _finished_before(folder, job)
        if not finished:
            validate_absent(job.prefix, config.overwrite)
            _run_job(job, tokenizer, folder, progress, say)
        folder.remove()
    files = tuple(job.prefix + s for s in SUFFIXES if os.path.exists(job.prefix + s))
    found = read_metadata(job.prefix) or {}
    seconds = time.perf_counter() - started
    return PreprocessStats(found, inputs.skipped, inputs.total_bytes, seconds, files, finished)


def _finished_before(folder: WorkFolder, job: PreprocessJob) -> bool:
    """Return whether this job is done, after moving into place what a killed process left."""
    own = folder.is_whole() and folder.is_of(job.identity_of_shard())
    folder.finish_publishing()
    return (own or not job.config.overwrite) and is_dataset_of(job)


def is_dataset_of(job: PreprocessJob) -> bool:
    """Return whether the files at the job's prefix are what it makes: all there, and whole."""
    try:
        found, wanted = read_metadata(job.prefix) or {}, job.fingerprint()
        if wanted is None or found.get(FINGERPRINT) != wanted or not set(found) >= COUNTED_KEYS:
            return False
        if tuple(found.get("shard", (0, 1))) != job.config.shard:
            return False
        index = read_index(job.prefix, empty=True)
        validate_metadata(index, found)
        has_mask(job.prefix, int(index.lengths.sum(dtype="int64")), found)
    except (UserError, FileNotFoundError):
        return False
    return True


@contextmanager
def _full_disk(folder: WorkFolder) -> Iterator[None]:
    """Say of a full disk what to do."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"--output-prefix {folder.prefix}: {os.strerror(exc.errno)}, needs room; start "
            f"again to continue with what is in {folder.path}"
        ) from exc


def _run_job(
    job: PreprocessJob,
    tokenizer: Tokenizer,
    folder: WorkFolder,
    progress: bool,
    say: Callable[[str], object],
) -> None:
    config = job.config
    done = folder.claim(job.identity_of_shard(), restart=config.restart)
    if done:
        say(f"continuing with {done} finished parts in {folder.path}")
    engine = config.engine if config.mask_key is None else "reference"  # locates its tokens
    samples = sample_texts(job, config.verify)
    chosen, reason = choose_engine(engine, tokenizer, samples, verify_all=config.verify < 0)
    say(reason)
    say(_describe_added_tokens(tokenizer, job))
    job = replace(job, fast=chosen is not tokenizer)
    units = job.own_units()
    for unit in units if job.reads_stdin else ():
        folder.drop_unit(unit)
    total = sum(map(job.unit_size, units))
    with _Bar(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        if config.ray is None:
            run_units(job, units, config.workers, bar.update, chosen, folder.release)
        else:
            run_on_ray(job, units, config.ray, bar.update)
    for file in job.files:
        if file != InputFile.of(Path(file.path), file.format):
            raise UserError(
                f"--input {file.path}: changed while it was read, needs to stay as it is; start "
                "again with --restart"
            )
    build_dataset(job, units, folder)
    folder.publish(config.overwrite)


class _Bar(tqdm):
    """A bar without a thread of its own: workers are forked only from a process of one."""

    monitor_interval = 0


def sample_texts(job: PreprocessJob, count: int) -> Iterator[str]:
    """Yield the beginnings of the first ``count`` documents; nothing of standard input."""
    for span in (span for unit in job.units for span in unit):
        if count <= 0 or span.path == str(STDIN):
            return
        for record in read_span(span, job.fields):
            try:
                text = record.text if isinstance(record.text, str) else next(record.text, "")
            except BadRecord:
                continue  # found again, and told, when it is its turn
            if record.error is not None:
                continue
            yield text[:EXCERPT_CHARACTERS]
            count -= 1
            if count <= 0:
                return


def _describe_added_tokens(tokenizer: Tokenizer, job: PreprocessJob) -> str:
    """Say what is put around a document, since a model is trained with one rule or the other."""
    head = "no bos" if job.bos is None else f"bos {job.bos}"
    tail = "no eod" if job.eod is None else f"eod {job.eod}"
    wanted = getattr(tokenizer, "template", "")
    note = f"; the tokenizer's own template is {wanted}" if wanted else ""
    return f"each document: {head}, its tokens, {tail}{note}"
