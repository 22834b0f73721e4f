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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cream.corpus.input_files import find_inputs
from megatron_cream.corpus.readers import read_documents as read_texts
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import (
    ForwardPass,
    ScoringModel,
    progress_bar,
    weigh_tokens,
)
from megatron_cream.evaluation.prompts import open_tokenizer, validate_vocabulary
from megatron_cream.evaluation.result_files import DOCUMENT_RECORDS
from megatron_cream.evaluation.results import (
    Records,
    buckets,
    grouped,
    perplexity_interval,
    perplexity_of,
)
from megatron_cream.evaluation.store import ResultStore, open_store


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


def _batches(all_windows: list[ScoredWindow], size: int) -> Iterator[tuple[ScoredWindow, ...]]:
    """Yield windows that score as many targets each, up to ``size`` of them."""
    for _, same in groupby(all_windows, key=attrgetter("scored")):
        yield from batched(same, size)


def _pass(tokens: np.ndarray, batch: Sequence[ScoredWindow]) -> ForwardPass:
    rows = np.stack([tokens[w.start : w.start + w.length + 1] for w in batch]).astype(np.int64)
    ids = torch.from_numpy(rows)
    length, scored = batch[0].length, batch[0].scored
    kept = torch.arange(length - scored, length)
    return ForwardPass(ids[:, :-1], kept, ids[:, 1:][:, kept])


def score_perplexity(
    settings: EvaluationSettings,
    model: ScoringModel,
    documents: list[np.ndarray],
) -> dict[str, Any]:
    """Score documents at every length and return the results; write them if there is a folder.

    A run that was killed is continued: documents that the folder has are not scored again.

    Args:
        documents: ids ``[tokens_per_document]`` each.
    """
    decisive = document_settings(settings, documents)
    with open_store(settings, model, "perplexity", decisive, DOCUMENT_RECORDS) as store:
        score_documents(settings, model, documents, store)
        return store.finish(perplexity_results(store.finished))


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
    known = product(settings.lengths, range(len(documents)))
    store.validate_finished(set(settings.lengths), set(known))
    strides = {
        length: None if settings.truncates else settings.stride or max(1, length // 2)
        for length in settings.lengths
    }
    tokens = settings.tokens_per_document
    works = {
        length: weigh_tokens(length * len(windows(tokens, length, stride)), length)
        for length, stride in strides.items()
    }
    done = store.done
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
                    None if keys is None else keys[number],
                )
                store.add([found.record()])


def perplexity_results(documents: Records) -> dict[str, Any]:
    """Return perplexity by length, and by length and position in the window.

    Args:
        documents: ``DocumentScore`` records.
    """
    groups = grouped(documents, lambda d: d["length"])
    return {
        "lengths": [_perplexity(group) for group in groups],
        "positions": [row for group in groups for row in _positions(group)],
    }


def _perplexity(documents: Records) -> dict[str, Any]:
    documents = sorted(documents, key=lambda d: d["document"])
    nll = [sum(d["nll"]) for d in documents]
    targets = [sum(d["targets"]) for d in documents]
    mean = sum(nll) / sum(targets)
    per_target = [n / t for n, t in zip(nll, targets, strict=True)]
    low, high = perplexity_interval(per_target)
    return {
        "length": documents[0]["length"],
        "perplexity": perplexity_of(mean),
        "low": low,
        "high": high,
        "nll": mean,
        "targets": sum(targets),
        "documents": len(documents),
        "document_nll": per_target,
    }


def _positions(documents: Records) -> Records:
    length = documents[0]["length"]
    edges = buckets(length)
    nll = np.sum([d["nll"] for d in documents], axis=0)
    targets = np.sum([d["targets"] for d in documents], axis=0)
    rows = zip(edges, edges[1:], nll, targets, strict=False)
    return [
        {
            "length": length,
            "from": first,
            "to": end,
            "perplexity": perplexity_of(total / count),
            "targets": int(count),
        }
        for first, end, total, count in rows
        if count
    ]


def hash_documents(documents: list[np.ndarray]) -> str:
    """Hash the documents: a run is not continued with other ones under the same name."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.astype("<i8").tobytes())
    return found.hexdigest()[:16]


def open_documents(settings: EvaluationSettings, model: ScoringModel) -> list[np.ndarray]:
    """Return ``documents`` documents ``[tokens_per_document]`` out of --data.

    It is an indexed dataset, or text that the model's tokenizer encodes.

    Raises:
        UserError, FileNotFoundError: no such data, or too little of it, or not the model's tokens.
    """
    data, tokens = str(settings.data), settings.tokens_per_document
    if Path(f"{data}.idx").exists() or not Path(data).exists():
        skip = settings.skip_documents
        documents = read_first_tokens(data, settings.documents, tokens, skip)
    else:
        documents = _encode_texts(settings, data, model, tokens)
    if (lowest := min(int(document.min()) for document in documents)) < 0:
        raise UserError(f"--data is {data}: it has token {lowest}, which is no token")
    highest = max(int(document.max()) for document in documents)
    if highest >= model.vocabulary:
        raise UserError(
            f"--data is {data}: it has token {highest}, the model's vocabulary has "
            f"{model.vocabulary}; it must be written with the model's tokenizer"
        )
    return documents


def read_first_tokens(prefix: str, count: int, tokens: int, skip: int = 0) -> list[np.ndarray]:
    """Return the first ``tokens`` tokens of ``count`` documents that have as many.

    The documents are spread evenly over those that are long enough, in order; the first ``skip`` of
    the dataset are passed over.

    Raises:
        UserError: fewer than ``count`` documents are long enough.
    """
    index = read_index(prefix)
    lengths = index.lengths[skip:]
    eligible = skip + np.flatnonzero(lengths >= tokens)
    if len(eligible) < count:
        longest = int(lengths.max(initial=0))
        raise _too_few_error(prefix, f"{len(eligible)} of its documents", tokens, longest, count)
    chosen = eligible[np.linspace(0, len(eligible) - 1, count).round().astype(int)]
    data = np.memmap(prefix + ".bin", mode="r", dtype=index.dtype)
    starts = index.pointers[chosen] // index.dtype.itemsize
    return [np.array(data[start : start + tokens]) for start in starts]


def _encode_texts(
    settings: EvaluationSettings, data: str, model: ScoringModel, tokens: int
) -> list[np.ndarray]:
    tokenizer, _ = open_tokenizer(settings)
    validate_vocabulary(tokenizer, model)
    documents: list[np.ndarray] = []
    longest = 0
    for path in find_inputs([data], "--data").files:
        for text in read_texts(path):
            ids = tokenizer.encode([text[: 32 * tokens]])[0]
            longest = max(longest, len(ids))
            if len(ids) >= tokens:
                documents.append(ids[:tokens])
            if len(documents) == settings.documents:
                return documents
    found = f"{len(documents)} of its texts"
    raise _too_few_error(data, found, tokens, longest, settings.documents)


def _too_few_error(data: str, found: str, tokens: int, longest: int, asked: int) -> UserError:
    return UserError(
        f"--data is {data}: {found} have {tokens} tokens (the longest has {longest}), --documents "
        f"asks for {asked}; take fewer or shorter ones (--document-tokens)"
    )
