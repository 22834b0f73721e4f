# SPDX-License-Identifier: Apache-2.0
"""Perplexity by context length: a window slides over each document, every target counts once.

All lengths score the same targets, so that two lengths differ by the context alone. (A window
that is longer than it ought to be is then as visible as one that is too short; published scripts
cap the window, count overlapping targets several times, or average over windows of different
sizes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cream.errors import UserError
from megatron_cream.evaluation.forward import Model, Pass

_FIRST_BUCKET = 256


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
class Window:
    """Inputs ``[start, start + length)``; the last ``scored`` of their targets count."""

    start: int
    length: int
    scored: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
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
    result, scored = [Window(0, length, length)], length
    while scored < tokens - 1:
        start = min(result[-1].start + stride, tokens - 1 - length)
        end = start + length
        result.append(Window(start, length, end - scored))
        scored = end
    return result


def buckets(length: int) -> list[int]:
    """Return edges 0, 256, 512, 1024 .. of the ranges of positions that are told apart.

    The position of a target is the number of tokens that its window has before it, less one.
    """
    edges = [0, _FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return edges[:-1] + [length] if len(edges) > 2 else [0, length]


def score_document(
    model: Model,
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


def cost(tokens: int, length: int, stride: int) -> int:
    """Return the input tokens that ``score_document`` will run through the model."""
    return length * len(windows(tokens, length, stride))


def _batches(all_windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Windows that score as many targets each, up to ``size`` of them."""
    batch: list[Window] = []
    for window in all_windows:
        if batch and (len(batch) == size or batch[0].scored != window.scored):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _pass(tokens: np.ndarray, batch: list[Window]) -> Pass:
    rows = np.stack([tokens[w.start : w.start + w.length + 1] for w in batch]).astype(np.int64)
    ids = torch.from_numpy(rows)
    length, scored = batch[0].length, batch[0].scored
    kept = torch.arange(length - scored, length)
    return Pass(ids[:, :-1], kept, ids[:, 1:][:, kept])
