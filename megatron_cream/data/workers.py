# SPDX-License-Identifier: Apache-2.0
"""Tokenizes documents, here or in worker processes, which never import megatron."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

import numpy as np

from megatron_cream.data.tokenizers import Tokenizer, load_tokenizer

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 256


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


def tokenized(
    documents: Iterable[str], tokenizer: Tokenizer, source: tuple[str, str | None], workers: int
) -> Iterator[np.ndarray]:
    """Ids of each document, in order; `source`, a type and a model, is what workers load."""
    if workers == 1:
        for batch in _batches(documents):
            with _one_thread():
                encoded = tokenizer.encode(batch)
            yield from encoded
        return
    pool = ProcessPoolExecutor(
        workers,
        # A forked worker would carry the parent's megatron and torch along.
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=source,
    )
    try:
        yield from _pooled(pool, 2 * workers, _batches(documents))
    except BrokenProcessPool as exc:
        raise ChildProcessError(
            f"--workers {workers}: a worker died, needs more memory or fewer workers "
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
