# SPDX-License-Identifier: Apache-2.0
"""Text to a Megatron indexed dataset: `PREFIX.bin`, `PREFIX.idx` and a note, `PREFIX.json`.

Nothing here imports megatron before the job is checked, and the workers never do.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream.data.text import TextInputs, find_inputs, read_documents
from megatron_cream.data.tokenizers import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
# In the order they are put in place: megatron finds a dataset by its .idx.
SUFFIXES = (".bin", ".json", ".idx")

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class PreprocessConfig:
    """A job; the fields are the flags of `tools/preprocess_data.py`."""

    input: tuple[str, ...]
    tokenizer_type: str
    output_prefix: str
    tokenizer_model: str | None = None
    json_key: str = "text"
    append_eod: bool = False
    prepend_bos: bool = False
    min_tokens: int = 1
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class PreprocessStats:
    """What a job did. Lengths are in tokens as written, eod and bos included."""

    documents: int
    tokens: int
    shorter_than_min_tokens: int
    mean_document: float
    median_document: float
    longest_document: int
    skipped_files: int
    input_bytes: int
    seconds: float
    files: tuple[str, ...]

    def summary(self) -> str:
        """Lines for a person; MB/s is in bytes of input read, 10**6 to the MB."""
        return "\n".join(
            (
                f"documents: {self.documents}",
                f"tokens: {self.tokens}",
                f"dropped: {self.shorter_than_min_tokens} shorter than --min-tokens",
                f"left out: {self.skipped_files} files of other kinds",
                f"tokens per document: mean {self.mean_document:.1f}, "
                f"median {self.median_document:.1f}, longest {self.longest_document}",
                f"speed: {self.input_bytes / 1e6 / self.seconds:.2f} MB/s",
                f"written: {' '.join(self.files)}",
            )
        )


def preprocess(config: PreprocessConfig, *, progress: bool = True) -> PreprocessStats:
    """Tokenize the input documents, one sequence each, into an indexed dataset.

    The three files appear whole or not at all, and are the same bytes for every number of
    workers. With two or more workers a script must call this under
    `if __name__ == "__main__":`, since they are fresh interpreters.

    Args:
        config: the job.
        progress: whether to show a bar on stderr, in bytes of input read.

    Raises:
        ValueError: a setting that cannot work, broken input, or no document left.
        OSError: a file that is missing or exists, cannot be read or written, or a worker that
            died (`ChildProcessError`).
    """
    tokenizer, inputs = _check(config)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    started = time.perf_counter()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    folder, name = os.path.split(config.output_prefix)
    with tempfile.TemporaryDirectory(dir=folder or ".", prefix=f".{name}.", suffix=".tmp") as tmp:
        staged = os.path.join(tmp, "data")
        builder = IndexedDatasetBuilder(staged + ".bin", dtype=dtype)
        with closing(builder.data_file):
            dropped = _write_documents(config, tokenizer, inputs, builder, progress)
            builder.finalize(staged + ".idx")
        lengths = np.array(builder.sequence_lengths, dtype=np.int64)
        note = _note(config, tokenizer, lengths, dropped, np.dtype(dtype).name)
        Path(staged + ".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        files = _publish(staged, config)
    return PreprocessStats(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        shorter_than_min_tokens=dropped,
        mean_document=float(lengths.mean()),
        median_document=float(np.median(lengths)),
        longest_document=int(lengths.max()),
        skipped_files=inputs.skipped,
        input_bytes=inputs.total_bytes,
        seconds=time.perf_counter() - started,
        files=files,
    )


def _check(config: PreprocessConfig) -> tuple[Tokenizer, TextInputs]:
    """Everything that can be found wrong before any input is read."""
    for flag, value in (("--workers", config.workers), ("--min-tokens", config.min_tokens)):
        if value < 1:
            raise ValueError(f"{flag} {value}: needs 1 or more")
    _check_output(config)
    tokenizer = load_tokenizer(config.tokenizer_type, config.tokenizer_model)
    wanted = (
        ("--append-eod", config.append_eod, "an end of document", tokenizer.eod),
        ("--prepend-bos", config.prepend_bos, "a beginning of sequence", tokenizer.bos),
    )
    for flag, asked, kind, token in wanted:
        if asked and token is None:
            model = config.tokenizer_model or tokenizer.name
            raise ValueError(f"{flag}: {model} has none, needs a tokenizer with {kind} token")
    inputs = find_inputs(config.input)
    targets = {os.path.realpath(config.output_prefix + suffix) for suffix in SUFFIXES}
    for path in inputs.files:
        if os.path.realpath(path) in targets:
            raise ValueError(
                f"--output-prefix {config.output_prefix}: {path} is an input, needs another prefix"
            )
    return tokenizer, inputs


def _check_output(config: PreprocessConfig) -> None:
    where = f"--output-prefix {config.output_prefix}"
    folder, name = os.path.split(config.output_prefix)
    if not name:
        raise ValueError(f"{where}: names a folder, needs FOLDER/NAME")
    if not os.path.isdir(folder or "."):
        raise FileNotFoundError(f"{where}: no folder {folder}, needs one that exists")
    if not os.access(folder or ".", os.W_OK | os.X_OK):
        raise ValueError(f"{where}: folder {folder or '.'} needs to be writable")
    _check_absent(config)


def _check_absent(config: PreprocessConfig) -> None:
    for suffix in SUFFIXES:
        path = config.output_prefix + suffix
        if os.path.lexists(path) and not config.overwrite:
            raise ValueError(
                f"--output-prefix {config.output_prefix}: {path} exists, "
                "needs a new prefix or --overwrite"
            )


def _write_documents(
    config: PreprocessConfig, tokenizer: Tokenizer, inputs: TextInputs, builder: Any, progress: bool
) -> int:
    """Add every document that is long enough to `builder`; returns how many were not."""
    head = np.array([tokenizer.bos] if config.prepend_bos else [], dtype=np.int32)
    tail = np.array([tokenizer.eod] if config.append_eod else [], dtype=np.int32)
    dropped = longest = 0
    with (
        tqdm(total=inputs.total_bytes, unit="B", unit_scale=True, disable=not progress) as bar,
        closing(_tokenized(config, tokenizer, _documents(config, inputs, bar))) as rows,
    ):
        for ids in rows:
            longest = max(longest, len(ids))
            if len(ids) < config.min_tokens:
                dropped += 1
                continue
            sequence = np.concatenate((head, ids, tail))
            builder.add_document(sequence, [len(sequence)])
    if longest == 0:
        given = " ".join(config.input)
        raise ValueError(f"--input {given}: holds no text, needs one document that is not empty")
    if len(builder.sequence_lengths) == 0:
        raise ValueError(
            f"--min-tokens {config.min_tokens}: none of the {dropped} documents is left, "
            f"needs at most {longest}, the tokens of the longest"
        )
    return dropped


def _documents(config: PreprocessConfig, inputs: TextInputs, bar: tqdm) -> Iterator[str]:
    for path in inputs.files:
        yield from read_documents(path, config.json_key, bar.update)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group short documents, so that handing them to a worker costs little for each."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenized(
    config: PreprocessConfig, tokenizer: Tokenizer, documents: Iterable[str]
) -> Iterator[np.ndarray]:
    """Ids of each document, in the order of the documents."""
    if config.workers == 1:
        for batch in _batches(documents):
            with _one_thread():
                encoded = tokenizer.encode(batch)
            yield from encoded
        return
    pool = ProcessPoolExecutor(
        config.workers,
        # A forked worker would carry the parent's megatron and torch along.
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(config.tokenizer_type, config.tokenizer_model),
    )
    try:
        yield from _pooled(pool, 2 * config.workers, _batches(documents))
    except BrokenProcessPool as exc:
        raise ChildProcessError(
            f"--workers {config.workers}: a worker died, needs more memory or fewer workers "
            '(and, in a script of your own, the call under `if __name__ == "__main__":`)'
        ) from exc
    finally:
        pool.shutdown(cancel_futures=True)


def _pooled(
    pool: ProcessPoolExecutor, ahead: int, batches: Iterable[list[str]]
) -> Iterator[np.ndarray]:
    """Like pool.map, which would read the whole input before its first result."""
    pending: deque[Any] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_in_worker, batch))
        if len(pending) >= ahead:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_type: str, tokenizer_model: str | None) -> None:
    global _worker_tokenizer
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode(texts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep one worker to one core: the tokenizers library takes them all if it is not told."""
    key = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(key)
    os.environ[key] = "false"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


def _note(
    config: PreprocessConfig, tokenizer: Tokenizer, lengths: np.ndarray, dropped: int, dtype: str
) -> dict[str, Any]:
    """The content of `PREFIX.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
        "bos_id": tokenizer.bos,
        "appended_eod": config.append_eod,
        "prepended_bos": config.prepend_bos,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "dropped": {"shorter_than_min_tokens": dropped},
        "min_tokens": config.min_tokens,
        "longest_document": int(lengths.max()),
        "dtype": dtype,
    }


def _publish(staged: str, config: PreprocessConfig) -> tuple[str, ...]:
    """Move the staged files into place, or leave everything as it was."""
    for suffix in SUFFIXES:
        _sync(staged + suffix)
    _check_absent(config)
    prefix, old = config.output_prefix, staged + ".old"
    try:
        # The old .idx goes first, so that it is never seen beside the new .bin.
        for suffix in reversed(SUFFIXES):
            if os.path.lexists(prefix + suffix):
                os.rename(prefix + suffix, old + suffix)
        for suffix in SUFFIXES:
            os.rename(staged + suffix, prefix + suffix)
    except BaseException:
        _restore(staged, old, prefix)
        raise
    _sync(os.path.dirname(prefix) or ".")
    return tuple(prefix + suffix for suffix in SUFFIXES)


def _restore(staged: str, old: str, prefix: str) -> None:
    for suffix in reversed(SUFFIXES):
        if not os.path.exists(staged + suffix):
            os.unlink(prefix + suffix)
    for suffix in SUFFIXES:
        if os.path.lexists(old + suffix):
            os.rename(old + suffix, prefix + suffix)


def _sync(path: str) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
