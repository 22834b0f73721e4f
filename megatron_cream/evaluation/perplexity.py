# SPDX-License-Identifier: Apache-2.0
"""Perplexity by context length: a window slides over each document, every target counts once.

All lengths score the same targets, so that two lengths differ by the context alone. (A window
that is longer than it ought to be is then as visible as one that is too short; published scripts
cap the window, count overlapping targets several times, or average over windows of different
sizes.) Or, with --truncate as papers' tables have it, one window has the first tokens of each
document, and each length targets of its own.
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
        key_nll: of those that are key tokens alone, in nats, where it is known which are.
        key_targets: their number.
    """

    length: int
    document: int
    nll: list[float]
    targets: list[int]
    key_nll: float | None = None
    key_targets: int | None = None

    def record(self) -> dict[str, Any]:
        """Return what cases.jsonl has of it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class ScoredWindow:
    """Inputs ``[start, start + length)``; the last ``scored`` of their targets count."""

    start: int
    length: int
    scored: int


def windows(tokens: int, length: int, stride: int | None) -> list[ScoredWindow]:
    """Cut a document of ``tokens`` tokens; each of its ``tokens - 1`` targets counts once.

    The first window scores all of its targets, each later one only those that are new. The last
    one is moved back to end with the document, so that all have ``length`` inputs. Without a
    stride it is one window of the first ``length`` tokens, which has ``length - 1`` targets.

    Raises:
        UserError: a stride that skips targets, or a document too short for one window.
    """
    if stride is None:
        if not 2 <= length <= tokens:
            raise UserError(f"a document of {tokens} tokens has no window of {length}")
        return [ScoredWindow(0, length - 1, length - 1)]
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
    stride: int | None,
    document: int = 0,
    batch_tokens: int = 8192,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    key: np.ndarray | None = None,
) -> DocumentScore:
    """Score a document with windows of ``length`` inputs at plain positions 0 .. length - 1.

    Args:
        tokens: ids ``[n]`` with n > length.
        stride: tokens between windows, at most ``length``; None for the first ``length`` tokens
            in one window.
        document: its number, for the record.
        batch_tokens: most input tokens in one forward pass.
        on_tokens: called with the number of input tokens of each finished pass.
        key: bool ``[n]``, which tokens are key tokens; they are counted by themselves as well.
    """
    edges = buckets(length)
    key_nll, key_targets = 0.0, 0
    nll, targets = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, dtype=np.int64)
    batches = list(_batches(windows(len(tokens), length, stride), max(1, batch_tokens // length)))
    passes = (_pass(tokens, batch) for batch in batches)
    for batch, scores in zip(batches, model.run(passes), strict=True):
        inputs = batch[0].length
        positions = np.arange(inputs - batch[0].scored, inputs)
        which = np.searchsorted(edges, positions, side="right") - 1
        nll += np.bincount(which, -scores.logprobs.numpy().sum(0), len(nll))
        targets += len(batch) * np.bincount(which, minlength=len(nll))
        if key is not None:
            chosen = np.stack([key[window.start + positions + 1] for window in batch])
            key_nll -= float(scores.logprobs.numpy()[chosen].sum())
            key_targets += int(chosen.sum())
        on_tokens(inputs * len(batch))
    found = DocumentScore(length, document, nll.tolist(), targets.tolist())
    if key is None:
        return found
    return dataclasses.replace(found, key_nll=key_nll, key_targets=key_targets)


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
    header = result_header(settings, model, "perplexity") | document_settings(settings, documents)
    with ResultStore(folder, header, DOCUMENT_RECORDS, model.primary) as store:
        known: set[tuple[int, ...]] = {
            (length, i) for length in settings.lengths for i in range(len(documents))
        }
        store.validate_finished(set(settings.lengths), known)
        score_documents(settings, model, documents, store)
        result = header | perplexity_results(store.finished)
        store.finish(result)
    return result


def document_settings(settings: EvaluationSettings, documents: list[np.ndarray]) -> dict[str, Any]:
    """Return what decides which targets are scored."""
    return {
        "data": settings.data,
        "documents": settings.documents,
        "document_tokens": settings.tokens_per_document,
        "stride": settings.stride,
        "truncate": settings.truncates or None,
        "data_content": hash_documents(documents),
    }


def score_documents(
    settings: EvaluationSettings,
    model: ScoringModel,
    documents: list[np.ndarray],
    store: ResultStore,
    keys: list[np.ndarray] | None = None,
) -> None:
    """Score documents that the store does not have, at every length.

    Args:
        documents: ids ``[n]`` each.
        keys: bool ``[n]`` each, which tokens are key tokens.
    """
    strides = {
        length: None if settings.truncates else settings.stride or max(1, length // 2)
        for length in settings.lengths
    }
    tokens = settings.tokens_per_document
    works = {
        length: weigh_tokens(length * len(windows(tokens, length, stride)), length)
        for length, stride in strides.items()
    }
    done = {store.kind.identity(record) for record in store.finished}
    total = len(documents) * sum(works.values())
    with progress_bar(settings.name or settings.tasks[0], total, model.primary) as bar:
        for length, stride in strides.items():
            model.set_length(length)

            def report(tokens: int, length: int = length) -> None:
                bar.update(weigh_tokens(tokens, length))

            for number, document in enumerate(documents):
                if (length, number) in done:
                    bar.update(works[length])
                    continue
                found = score_document(
                    *(model, document, length, stride, number, settings.batch_tokens, report),
                    keys and keys[number],
                )
                store.add([found.record()])


def hash_documents(documents: list[np.ndarray]) -> str:
    """Hash the documents: a run is not continued with other ones under the same name."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.astype("<i8").tobytes())
    return found.hexdigest()[:16]
