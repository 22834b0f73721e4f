# SPDX-License-Identifier: Apache-2.0
"""Counts how much of its training datasets a run will read, for lines of the start block."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.indexed import has_mask, open_index, read_metadata, trained_tokens
from megatron_cream.data.packed import pack_sources, trained_length
from megatron_cream.data.text_sources import TextSources
from megatron_cream.positions import SampleLayout, Span, philox
from megatron_cream.training.blend import prefixes_by_split, split_sources

A_FEW = 4
"""Times that a token is read from which a run is warned: a model then learns text by heart."""


def tokens_read(args: Namespace, extension: ExtensionConfig) -> list[str]:
    """Return a line for each training dataset: how many of its tokens are read, how often.

    A dataset with a mask has a second line, which share of its tokens has a loss.
    """
    total = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    found = _training_sources(args, extension)
    sizes = [_epoch_size(extension, sources) for _, sources in found]
    lines = []
    for (prefix, sources), size, share in zip(found, sizes, _shares(args, sizes), strict=True):
        if total and size:
            result = _repetition(extension, sources, total * share / size)
            lines.append(f"{_line(sources, result)}: {prefix}")
    return lines + [line for prefix, _ in found for line in _mask_lines(prefix)]


def _mask_lines(prefix: str) -> list[str]:
    tokens, metadata = open_index(prefix).tokens, read_metadata(prefix)
    if not has_mask(prefix, tokens, metadata):
        return []
    share = 100 * trained_tokens(prefix, metadata) / tokens
    return [f"loss on {share:.3g} % of the tokens of {prefix}"]


def _training_sources(args: Namespace, extension: ExtensionConfig) -> list[tuple[str, TextSources]]:
    return [
        (prefix, split_sources(args, prefix, splits[Split.train], extension, Split.train))
        for prefix, splits in prefixes_by_split(args).items()
        if Split.train in splits
    ]


def _shares(args: Namespace, sizes: list[int]) -> list[float]:
    """Return the share of the samples of each dataset; without weights, by their epochs."""
    blend, per_split = get_blend_and_blend_per_split(args)
    weights: Any = (blend or per_split[Split.train.value])[1]
    weights = sizes if weights is None else weights
    return [weight / sum(weights) for weight in weights]


def _epoch_size(extension: ExtensionConfig, sources: TextSources) -> int:
    if extension.sample_unit != "packed-documents":
        return len(sources)
    return len(pack_sources(sources, extension.strategy()))


def _repetition(extension: ExtensionConfig, sources: TextSources, epochs: float) -> Repetition:
    strategy, seed = extension.strategy(), extension.position_seed
    if extension.sample_unit != "packed-documents":
        return repetition(sources, epochs, lambda source, draw: strategy.layout(seed, draw))

    def layout_of(source: int, draw: int) -> SampleLayout:
        length = int(trained_length(sources.stretch(source)[1], strategy))
        return strategy.for_length(length).layout(seed, draw)

    return repetition(sources, epochs, layout_of)


def _line(sources: TextSources, result: Repetition) -> str:
    size = int(sources.lengths.sum(dtype=np.int64))
    read = f"{_count(result.share * size)} of {_count(size)} tokens"
    times = "once" if result.most == 1 else f"{result.most} times"
    line = f"{read}, the most repeated {times}"
    warning = " (WARNING: text that is read so often is learned by heart; give more)"
    return line + (warning if result.most > A_FEW else "")


def _count(tokens: float) -> str:
    if tokens < 100_000:
        return f"{tokens:.0f}"
    return f"{tokens / 1e3:.0f} K" if tokens < 1e6 else f"{tokens / 1e6:.1f} M"


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
    sources: TextSources, epochs: float, layout_of: Callable[[int, int], SampleLayout]
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
