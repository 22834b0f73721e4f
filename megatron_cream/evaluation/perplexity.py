# SPDX-License-Identifier: Apache-2.0
"""Perplexity by context length: a window slides over each document, every target counts once.

All lengths score the same targets, so that two lengths differ by the context alone. (A window
that is longer than it ought to be is then as visible as one that is too short; published scripts
cap the window, count overlapping targets several times, or average over windows of different
sizes.)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import (
    ForwardPass,
    ScoringModel,
    progress_bar,
    weigh_tokens,
)
from megatron_cream.evaluation.open_model import open_documents, result_header
from megatron_cream.evaluation.result_files import DOCUMENT_RECORDS
from megatron_cream.evaluation.results import buckets, perplexity_results
from megatron_cream.evaluation.store import ResultStore


@dataclass(frozen=True)
class DocumentScore:
    """What a model made of one document at one context length.

    Attributes:
        length: context length L in tokens.
        document: which one.
        nll: summed negative log-likelihood of its targets, in nats, by bucket of ``buckets``.
        targets: their number, by bucket.
    """

    length: int
    document: int
    nll: list[float]
    targets: list[int]


@dataclass(frozen=True)
class ScoredWindow:
    """Inputs ``[start, start + length)``; the last ``scored`` of their targets count."""

    start: int
    length: int
    scored: int


def windows(tokens: int, length: int, stride: int) -> list[ScoredWindow]:
    """Cut a document of ``tokens`` tokens; each of its ``tokens - 1`` targets counts once.

    The first window scores all of its targets, each later one only those that are new. The last
    one is moved back to end with the document, so that all have ``length`` inputs.

    Raises:
        UserError: a stride that skips targets, or a document too short for one window.
    """
    if not 1 <= stride <= length:
        raise UserError(f"--stride is {stride}: it must be from 1 to the length {length}")
    if tokens < length + 1:
        raise UserError(f"a document of {tokens} tokens is too short for windows of {length}")
    result, scored = [ScoredWindow(0, length, length)], length
    while scored < tokens - 1:
        start = min(result[-1].start + stride, tokens - 1 - length)
        end = start + length
        result.append(ScoredWindow(start, length, end - scored))
        scored = end
    return result


def score_document(
    model: ScoringModel,
    tokens: np.ndarray,
    length: int,
    stride: int,
    document: int = 0,
    batch_tokens: int = 8192,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> DocumentScore:
    """Score a document with windows of ``length`` inputs at plain positions 0 .. length - 1.

    Args:
        tokens: ids ``[n]`` with n > length.
        stride: tokens between windows, at most ``length``.
        document: its number, for the record.
        batch_tokens: most input tokens in one forward pass.
        on_tokens: called with the number of input tokens of each finished pass.
    """
    edges = buckets(length)
    nll, targets = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, dtype=np.int64)
    batches = list(_batches(windows(len(tokens), length, stride), max(1, batch_tokens // length)))
    passes = (_pass(tokens, batch) for batch in batches)
    for batch, scores in zip(batches, model.run(passes), strict=True):
        positions = np.arange(length - batch[0].scored, length)
        which = np.searchsorted(edges, positions, side="right") - 1
        nll += np.bincount(which, -scores.logprobs.numpy().sum(0), len(nll))
        targets += len(batch) * np.bincount(which, minlength=len(nll))
        on_tokens(length * len(batch))
    return DocumentScore(length, document, nll.tolist(), targets.tolist())


def _batches(all_windows: list[ScoredWindow], size: int) -> Iterator[list[ScoredWindow]]:
    """Yield windows that score as many targets each, up to ``size`` of them."""
    batch: list[ScoredWindow] = []
    for window in all_windows:
        if batch and (len(batch) == size or batch[0].scored != window.scored):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _pass(tokens: np.ndarray, batch: list[ScoredWindow]) -> ForwardPass:
    rows = np.stack([tokens[w.start : w.start + w.length + 1] for w in batch]).astype(np.int64)
    ids = torch.from_numpy(rows)
    length, scored = batch[0].length, batch[0].scored
    kept = torch.arange(length - scored, length)
    return ForwardPass(ids[:, :-1], kept, ids[:, 1:][:, kept])


def score_perplexity(
    settings: EvaluationSettings,
    model: ScoringModel,
    folder: str | None = None,
    documents: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Score documents at every length and return the results; write them if there is a folder.

    A run that was killed is continued: documents that the folder has are not scored again.

    Args:
        documents: ids ``[tokens_per_document]`` each; those of --data unless given.
    """
    documents = documents or open_documents(settings, model)
    header = result_header(settings, model, "perplexity") | {
        "data": settings.data,
        "documents": settings.documents,
        "document_tokens": settings.tokens_per_document,
        "stride": settings.stride,
        "data_content": _content(documents),
    }
    with ResultStore(folder, header, DOCUMENT_RECORDS, model.primary) as store:
        known: set[tuple[int, ...]] = {
            (length, i) for length in settings.lengths for i in range(len(documents))
        }
        store.validate_finished(set(settings.lengths), known)
        _score_documents(settings, model, documents, store)
        result = header | perplexity_results(store.finished)
        store.finish(result)
    return result


def _score_documents(
    settings: EvaluationSettings,
    model: ScoringModel,
    documents: list[np.ndarray],
    store: ResultStore,
) -> None:
    strides = {length: settings.stride or max(1, length // 2) for length in settings.lengths}
    tokens = settings.tokens_per_document
    works = {
        length: weigh_tokens(length * len(windows(tokens, length, stride)), length)
        for length, stride in strides.items()
    }
    done = {DOCUMENT_RECORDS.identity(record) for record in store.finished}
    total = len(documents) * sum(works.values())
    with progress_bar(settings.name or "perplexity", total, model.primary) as bar:
        for length, stride in strides.items():
            model.set_length(length)

            def report(tokens: int, length: int = length) -> None:
                bar.update(weigh_tokens(tokens, length))

            for number, document in enumerate(documents):
                if (length, number) in done:
                    bar.update(works[length])
                    continue
                found = score_document(
                    model, document, length, stride, number, settings.batch_tokens, report
                )
                store.add([dataclasses.asdict(found)])


def _content(documents: list[np.ndarray]) -> str:
    """Hash the documents: a run is not continued with other ones under the same name."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.astype("<i8").tobytes())
    return found.hexdigest()[:16]
