# SPDX-License-Identifier: Apache-2.0
"""Text to a Megatron indexed dataset: `PREFIX.bin`, `PREFIX.idx` and a note, `PREFIX.json`.

A job is cut into parts by bytes of input. Workers write parts into `PREFIX.parts`; when all are
there they are put in a row and moved into place. A job that was ended in any way goes on with the
parts it has. Nothing here imports megatron.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cream.corpus.engine import choose_engine, first_texts
from megatron_cream.corpus.finish import finish, is_dataset_of
from megatron_cream.corpus.inputs import STDIN, TextInputs
from megatron_cream.corpus.job import InputFile, Job
from megatron_cream.corpus.publish import SUFFIXES, check_absent, finish_publishing, publish
from megatron_cream.corpus.settings import PreprocessConfig, check
from megatron_cream.corpus.statistics import draw_histogram
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.corpus.work_folder import PREPROCESSING, WorkFolder
from megatron_cream.corpus.workers import one_thread, run_units
from megatron_cream.data.metadata import read_metadata
from megatron_cream.errors import UserError

__all__ = ["PreprocessConfig", "PreprocessStats", "preprocess"]

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
    job, tokenizer, inputs = check(config)
    with WorkFolder(job.prefix, PREPROCESSING) as folder, one_thread():
        try:
            finished = _finished_before(folder, job, config)
            if not finished:
                check_absent(job.prefix, config.overwrite)
                _make(config, job, tokenizer, inputs, folder, progress, say)
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


def _finished_before(folder: WorkFolder, job: Job, config: PreprocessConfig) -> bool:
    """Say whether this very job is done, after moving into place what a killed process left."""
    if folder.is_whole():
        own = folder.is_of(job)
        finish_publishing(folder.staged, job.prefix)
        if own:
            return is_dataset_of(job, config.thresholds())
    return not config.overwrite and is_dataset_of(job, config.thresholds())


def _make(
    config: PreprocessConfig,
    job: Job,
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
    texts = first_texts(pieces, job.fields, config.verify if config.verify >= 0 else 0)
    fast, reason = choose_engine(config.engine, tokenizer, texts)
    say(reason)
    say(_around(tokenizer, job))
    job = replace(job, fast=None if fast is None else fast.source)
    units = job.own_units()
    for unit in units:
        if any(piece.path == str(STDIN) for piece in job.units[unit]):
            folder.drop_unit(unit)
    with _Bar(total=_bytes_of(job, units), unit="B", unit_scale=True, disable=not progress) as bar:
        if config.ray is None:
            run_units(job, units, config.workers, bar.update, fast or tokenizer, folder.let_go)
        else:
            from megatron_cream.corpus.ray_executor import run_on_ray

            run_on_ray(job, units, config.ray, bar.update)
    _check_unchanged(job)
    finish(config, job, units, folder)
    publish(folder.staged, job.prefix, config.overwrite)


class _Bar(tqdm):
    """A bar without a thread of its own: workers are forked only from a process of one."""

    monitor_interval = 0


def _bytes_of(job: Job, units: list[int]) -> int:
    return sum(job.unit_size(unit) for unit in units)


def _around(tokenizer: Tokenizer, job: Job) -> str:
    """Say what is put around a document, since a model is trained with one rule or the other."""
    head = "no bos" if job.bos is None else f"bos {job.bos}"
    tail = "no eod" if job.eod is None else f"eod {job.eod}"
    wanted = getattr(tokenizer, "template", "")
    note = f"; the tokenizer's own template is {wanted}" if wanted else ""
    return f"each document: {head}, its tokens, {tail}{note}"


def _check_unchanged(job: Job) -> None:
    """Refuse parts of a file that became another one while it was read."""
    for file in job.files:
        if file != InputFile.of(Path(file.path), file.format):
            raise UserError(
                f"--input {file.path}: changed while it was read, needs to stay as it is; start "
                "again with --restart"
            )
