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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path

from tqdm import tqdm

from megatron_cream.corpus.encode import EncodedPart, UnitEncoder, finished_units
from megatron_cream.corpus.executors import import_ray, run_in_pool, run_on_ray, use_one_thread
from megatron_cream.corpus.fast_encoder import EXCERPT_CHARACTERS, choose_engine
from megatron_cream.corpus.input_files import STDIN, InputFile, lines_before, place
from megatron_cream.corpus.inspection import (
    DUPLICATES,
    FINGERPRINT,
    LISTED_ERRORS,
    Counts,
    PreprocessStats,
    write_metadata,
)
from megatron_cream.corpus.job import PreprocessConfig, PreprocessJob, plan_job
from megatron_cream.corpus.merge import first_copies
from megatron_cream.corpus.readers import BadRecord, read_span
from megatron_cream.corpus.storage import (
    PREPROCESSING,
    SUFFIXES,
    WorkFolder,
    assemble,
    write_hashes,
)
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.data.indexed import read_metadata
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
        # What a killed process left is moved into place first.
        moved = folder.finish_publishing(job.identity_of_shard())
        finished = (moved or not config.overwrite) and job.is_made()
        if not finished:
            _make_dataset(job, tokenizer, folder, progress, say)
        folder.remove()
    files = tuple(job.prefix + s for s in SUFFIXES if os.path.exists(job.prefix + s))
    found = read_metadata(job.prefix) or {}
    seconds = time.perf_counter() - started
    return PreprocessStats(found, inputs.skipped, inputs.total_bytes, seconds, files, finished)


def _make_dataset(
    job: PreprocessJob,
    tokenizer: Tokenizer,
    folder: WorkFolder,
    progress: bool,
    say: Callable[[str], object],
) -> None:
    """Encode what is not encoded yet, and put the parts together at the output's place."""
    config = job.config
    identity = job.identity_of_shard()
    done = folder.claim(identity, restart=config.restart, overwrite=config.overwrite)
    if done:
        say(f"continuing with {done} finished parts in {folder.path}")
    engine = config.engine if config.mask_key is None else "reference"  # locates its tokens
    samples = sample_texts(job, config.verify)
    chosen, reason = choose_engine(engine, tokenizer, samples, verify_all=config.verify < 0)
    say(reason)
    say(job.describe_added_tokens(tokenizer))
    job = replace(job, fast=chosen is not tokenizer)
    units = job.own_units()
    with _Bar(total=sum(units.values()), unit="B", unit_scale=True, disable=not progress) as bar:
        _encode_units(job, units, chosen, bar.update, folder)
    read = {span.path for unit in units for span in job.units[unit]}
    for file in job.files:  # those of other shards are theirs to look at
        path = Path(file.path)
        if file.path not in read or path == STDIN:
            continue
        if file != InputFile.of(path, file.format, path.stat()):
            raise UserError(
                f"--input {file.path}: changed while it was read, needs to stay as it is; start "
                "again with --restart"
            )
    build_dataset(job, units, folder)
    folder.publish(config.overwrite)


def _encode_units(
    job: PreprocessJob,
    units: dict[int, int],
    tokenizer: Tokenizer,
    on_bytes: Callable[[int], object],
    folder: WorkFolder,
) -> None:
    """Write all parts of ``units``: by a cluster, by several processes, or by this one."""
    workers = min(job.config.workers, len(units))
    if job.config.ray is not None:
        run_on_ray(job, units, job.config.ray, on_bytes)
    elif workers > 1:
        run_in_pool(job, units, workers, on_bytes, tokenizer, folder.release)
    else:
        encoder = UnitEncoder(job, on_bytes, tokenizer)
        for unit in units:
            encoder.run(unit)


def build_dataset(job: PreprocessJob, units: Iterable[int], folder: WorkFolder) -> None:
    """Make the files of the dataset, at ``folder.staged``, out of all parts of ``units``.

    Raises:
        UserError: a part is missing, a bad record is one too many, or no document is left.
        OSError: they cannot be written.
    """
    config, settings = job.config, {**job.metadata(), FINGERPRINT: job.fingerprint()}
    sharded = config.shard[1] > 1
    if sharded:
        settings |= {
            "shard": list(config.shard),
            "job": job.digest(),
            "thresholds": config.thresholds,
            "drop_duplicates": config.drop_duplicates,
        }
    parts = finished_units(job, units)
    counts = count_left_out(job, parts)
    segments = [part.segment(job) for part in parts]
    kept = first_copies(segments, str(folder.path)) if config.drop_duplicates else None
    if kept is not None:
        counts.add({DUPLICATES: int((~kept).sum())}, {})
    documents = assemble(folder.staged, job.dtype, segments, kept)
    if sharded and kept is not None:
        write_hashes(folder.staged + ".hashes", segments, kept)
    if not documents and not sharded:
        folder.remove()
        raise UserError(_describe_nothing_left(config, counts))
    write_metadata(folder.staged, settings, counts, config.thresholds)


def _describe_nothing_left(config: PreprocessConfig, counts: Counts) -> str:
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


class _Bar(tqdm):
    """A bar without a thread of its own: workers are forked only from a process of one."""

    monitor_interval = 0


def sample_texts(job: PreprocessJob, count: int) -> Iterator[str]:
    """Yield the beginnings of the first ``count`` documents; nothing of standard input."""
    return islice(_beginnings(job), max(count, 0))


def _beginnings(job: PreprocessJob) -> Iterator[str]:
    every = chain.from_iterable(job.units)
    for span in takewhile(lambda span: span.path != str(STDIN), every):
        for record in read_span(span, job.fields):
            # What is bad is found again, and told, when it is its turn.
            with suppress(BadRecord):
                text = record.text if isinstance(record.text, str) else next(record.text, "")
                if record.error is None:
                    yield text[:EXCERPT_CHARACTERS]


def count_left_out(job: PreprocessJob, parts: list[EncodedPart]) -> Counts:
    """Add up what the parts left out, naming bad records by their line in the file.

    Raises:
        UserError: there is a bad record, and none is to be skipped.
    """
    reasons = ("shorter_than_min_tokens", "longer_than_max_tokens", DUPLICATES)
    counts = Counts(Counter(dict.fromkeys(reasons, 0)))
    for part in parts:
        found = part.metadata
        dropped = {"shorter_than_min_tokens": found.shorter, "longer_than_max_tokens": found.longer}
        counts.add(dropped, found.errors)
        counts.longest = max(counts.longest, found.longest)
    counts.list_errors(_list_bad_records(job, parts))
    if counts.errors and job.config.on_error == "fail":
        raise UserError(": ".join(counts.listed[0]))
    return counts


def _list_bad_records(job: PreprocessJob, parts: list[EncodedPart]) -> list[list[str]]:
    """Place and reason of the first bad records, counting the lines of each file once."""
    every = [
        (job.units[part.unit][bad[0]], *bad[1:]) for part in parts for bad in part.metadata.listed
    ]
    every = every[:LISTED_ERRORS]
    starts: dict[str, set[int]] = {}
    for span, *_ in every:
        if span.start:
            starts.setdefault(span.path, set()).add(span.start)
    before = {
        (path, start): lines
        for path, found in starts.items()
        for start, lines in zip(sorted(found), lines_before(path, sorted(found)), strict=True)
    }
    return [
        [place(span, before.get((span.path, span.start), 0) + number), f"{kind}: {detail}"]
        for span, number, kind, detail in every
    ]
