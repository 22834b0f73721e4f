# SPDX-License-Identifier: Apache-2.0
"""Perplexity by context length: a window slides over each document, every target counts once.

All lengths score the same targets, so that two lengths differ by the context alone. (A window
that is longer than it ought to be is then as visible as one that is too short; published scripts
cap the window, count overlapping targets several times, or average over windows of different
sizes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Perplexity:
    """Result for one context length.

    Attributes:
        length: context length L in tokens.
        nll: mean negative log-likelihood a target, in nats.
        targets: number of targets scored.
        standard_error: of ``nll``, over documents; NaN for one document.
    """

    length: int
    nll: float
    targets: int
    standard_error: float

    @property
    def value(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


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
        ValueError: a stride that skips targets, or a document too short for one window.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"--stride is {stride}: it must be from 1 to the length {length}")
    if tokens < length + 1:
        raise ValueError(f"a document of {tokens} tokens is too short for windows of {length}")
    result, scored = [Window(0, length, length)], length
    while scored < tokens - 1:
        start = min(result[-1].start + stride, tokens - 1 - length)
        end = start + length
        result.append(Window(start, length, end - scored))
        scored = end
    return result


def perplexity(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    length: int,
    stride: int,
    batch_tokens: int = 8192,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Score documents with windows of ``length`` inputs at plain positions 0 .. length - 1.

    Args:
        model: returns losses ``[b, s]`` for ``input_ids``, ``position_ids`` and ``labels``.
        documents: token ids of each, ``[n]`` with n > length.
        stride: tokens between windows, at most ``length``.
        batch_tokens: most input tokens in one forward pass.
        on_tokens: called with the number of input tokens of each finished pass.
    """
    sums = np.zeros(len(documents))
    counts = np.zeros(len(documents), dtype=np.int64)
    batch_size = max(1, batch_tokens // length)
    for batch in _batches(documents, length, stride, batch_size):
        losses = _losses(model, [documents[i][w.start : w.start + length + 1] for i, w in batch])
        for (document, window), row in zip(batch, losses, strict=True):
            sums[document] += row[-window.scored :].sum()
            counts[document] += window.scored
        on_tokens(length * len(batch))
    means = sums / counts
    spread = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Perplexity(length, float(sums.sum() / counts.sum()), int(counts.sum()), float(spread))


def cost(documents: Sequence[np.ndarray], length: int, stride: int) -> int:
    """Return the input tokens that ``perplexity`` will run through the model."""
    return sum(length * len(windows(len(document), length, stride)) for document in documents)


def _batches(
    documents: Sequence[np.ndarray], length: int, stride: int, size: int
) -> Iterator[list[tuple[int, Window]]]:
    batch: list[tuple[int, Window]] = []
    for index, document in enumerate(documents):
        for window in windows(len(document), length, stride):
            batch.append((index, window))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _losses(model: torch.nn.Module, texts: list[np.ndarray]) -> np.ndarray:
    """float64 ``[b, L]`` losses of texts of L + 1 tokens."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.stack(texts).astype(np.int64)).to(device)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    output = model(
        input_ids=inputs, position_ids=positions, attention_mask=None, labels=labels.contiguous()
    )
    return output.double().cpu().numpy()
