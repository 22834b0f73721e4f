# SPDX-License-Identifier: Apache-2.0
"""How much of a dataset a run reads, and how often the same tokens.

Counted over some of the sources at layouts of the run's strategy, so that it takes no longer for a
large dataset than for a small one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cream.data.sources import Sources
from megatron_cream.positions import Layout, Span, philox

_SOURCES = 256
_EPOCHS = 32
_STREAM = 5  # keeps what is counted apart from what a run draws


@dataclass(frozen=True)
class Repetition:
    """What a run reads of a dataset.

    Attributes:
        share: of the tokens of all sources, those that are read at all.
        most: how many times the most repeated ones are read.
    """

    share: float
    most: int


def repetition(
    sources: Sources, epochs: float, layout_of: Callable[[int, int], Layout]
) -> Repetition:
    """Return how often tokens are read by a run of so many epochs.

    Args:
        sources: what an epoch reads, each once.
        epochs: any real number above 0.
        layout_of: source and draw to a layout.
    """
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(_SOURCES, len(sources))).astype(int))
    draws = philox.generator(0, 0, _STREAM).permutation(len(chosen))
    counted = min(epochs, _EPOCHS)
    read = most = 0
    for rank, source in zip(draws.tolist(), chosen.tolist(), strict=True):
        # Of a part of an epoch, every source has its part of the chance, as evenly as can be.
        times = int(counted + (rank + 0.5) / len(chosen))
        length = sources.lengths.item(source)
        layouts = (layout_of(source, _EPOCHS * rank + epoch) for epoch in range(times))
        union, deepest = _overlap([span for layout in layouts for span in layout.spans(length)])
        read, most = read + union, max(most, deepest)
    share = read / int(sources.lengths[chosen].sum())
    return Repetition(share, round(most * epochs / counted))


def _overlap(spans: list[Span]) -> tuple[int, int]:
    """Return the tokens that any span holds, and how many spans hold the same one at most."""
    if not spans:
        return 0, 0
    offsets, lengths = np.array(spans, dtype=np.int64).T
    at = np.concatenate([offsets, offsets + lengths])
    steps = np.repeat([1, -1], len(spans))
    order = np.lexsort((steps, at))  # at one place, ends before beginnings
    depth = np.cumsum(steps[order])
    covered = np.diff(at[order])[depth[:-1] > 0].sum()
    return int(covered), int(depth.max())
