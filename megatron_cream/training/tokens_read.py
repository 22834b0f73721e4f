# SPDX-License-Identifier: Apache-2.0
"""How much of its training datasets a run will read: lines of the start block."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.indexed import read_index
from megatron_cream.data.packed import pack
from megatron_cream.data.sources import PACK_MULTIPLE, Repetition, Sources, make_sources, repetition
from megatron_cream.positions import SampleLayout
from megatron_cream.training.blend import prefixes_by_split

A_FEW = 4
"""Times that a token is read from which a run is warned: a model then learns text by heart."""


def tokens_read(args: Namespace, extension: ExtensionConfig) -> list[str]:
    """Return a line for each training dataset: how many of its tokens are read, how often."""
    total = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    found = _training_sources(args, extension)
    sizes = [_epoch_size(extension, sources) for _, sources in found]
    lines = []
    for (prefix, sources), size, share in zip(found, sizes, _shares(args, sizes), strict=True):
        if total and size:
            result = _repetition(extension, sources, total * share / size)
            lines.append(f"{_line(sources, result)}: {prefix}")
    return lines


def _training_sources(args: Namespace, extension: ExtensionConfig) -> list[tuple[str, Sources]]:
    found = []
    for prefix, splits in prefixes_by_split(args).items():
        if Split.train not in splits:
            continue
        index, (begin, end) = read_index(prefix), splits[Split.train]
        own = slice(round(begin * len(index.lengths)), round(end * len(index.lengths)))
        starts = index.pointers[own] // index.dtype.itemsize
        unit, strategy = extension.sample_unit, extension.strategy()
        found.append((prefix, make_sources(unit, starts, index.lengths[own], strategy)))
    return found


def _shares(args: Namespace, sizes: list[int]) -> list[float]:
    """Return the share of the samples of each dataset; without weights, by their epochs."""
    blend, per_split = get_blend_and_blend_per_split(args)
    weights: Any = (blend or per_split[Split.train.value])[1]
    weights = sizes if weights is None else weights
    return [weight / sum(weights) for weight in weights]


def _trained(extension: ExtensionConfig, sources: Sources) -> np.ndarray:
    """Tokens that a packed sample takes of each source."""
    return np.minimum(sources.lengths, extension.train_length) // PACK_MULTIPLE * PACK_MULTIPLE


def _epoch_size(extension: ExtensionConfig, sources: Sources) -> int:
    if extension.sample_unit != "packed-documents":
        return len(sources)
    return len(pack(_trained(extension, sources).astype(np.int64), extension.train_length))


def _repetition(extension: ExtensionConfig, sources: Sources, epochs: float) -> Repetition:
    strategy, seed = extension.strategy(), extension.position_seed
    if extension.sample_unit != "packed-documents":
        return repetition(sources, epochs, lambda source, draw: strategy.layout(seed, draw))
    trained = _trained(extension, sources)

    def layout_of(source: int, draw: int) -> SampleLayout:
        return strategy.for_length(int(trained[source])).layout(seed, draw)

    return repetition(sources, epochs, layout_of)


def _line(sources: Sources, result: Repetition) -> str:
    size = int(sources.lengths.sum())
    read = f"{_count(result.share * size)} of {_count(size)} tokens"
    line = f"{read}, the most repeated {result.most} time(s)"
    warning = " (WARNING: text that is read so often is learned by heart; give more)"
    return line + (warning if result.most > A_FEW else "")


def _count(tokens: float) -> str:
    if tokens < 100_000:
        return f"{tokens:.0f}"
    return f"{tokens / 1e3:.0f} K" if tokens < 1e6 else f"{tokens / 1e6:.1f} M"
