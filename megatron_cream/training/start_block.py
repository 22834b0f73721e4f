# SPDX-License-Identifier: Apache-2.0
"""Prints at start what a run will do: the settings as they will be used, and what it will read."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from megatron_cream.checkpoint.loading import find_start
from megatron_cream.config import ExtensionConfig
from megatron_cream.data.indexed import DatasetFiles
from megatron_cream.data.packed import pack_sources, trained_length
from megatron_cream.data.text_sources import TextSources
from megatron_cream.extras.rotation import rope_kernel
from megatron_cream.mcore import patches
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.positions import SampleLayout, Span, Strategy, coverage, philox
from megatron_cream.rope import RopeScaling
from megatron_cream.training.datasets import training_sources

# Beyond this many layouts coverage has converged, and a start must not wait for it.
_SAMPLES = 32_000
_PAIRS = 200_000  # of chunks, each of which is counted
_DENSE_SAMPLES = 64  # strategies without chunks take O(T log T) per sample


def start_block(args: Namespace, extension: ExtensionConfig) -> str:
    """Return the settings of a run as they will be used, each on a line."""
    strategy = extension.strategy()
    layout = strategy.layout(extension.position_seed, 0)
    ids = layout.position_ids
    scaling = extension.scaling(rotary_dim(args))
    shortest, longest = scaling.wavelengths
    fields = {
        "trained window N": f"{extension.train_length} tokens",
        "target window T": f"{extension.target_length} tokens, {strategy.factor:g} x N",
        "positions": _positions_line(extension),
        "sample 0": f"{_ends(ids)}, in {_chunks(layout)}",
        "distances trained": _coverage_line(args, extension),
        "rope": extension.describe_rope(rotary_dim(args)),
        "attention factor": _attention_factor_line(args, scaling),
        "wavelengths": f"{shortest:.2f} to {longest:.0f} tokens",
        "rope kernel": rope_kernel(args, extension),
        "labels": f"{extension.label_rule}, samples from: {extension.sample_unit}",
        "weights": _weights_line(args),
        "patches": ", ".join(patches.applied()),
    }
    if args.tensorboard_dir and find_spec("tensorboard") is None:
        fields["tensorboard"] = "is not installed: nothing is written to --tensorboard-dir"
    rows = [*fields.items(), *(("tokens read", line) for line in tokens_read(args, extension))]
    width = max(map(len, fields))
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["megatron_cream", *lines])


def _weights_line(args: Namespace) -> str:
    start = find_start(args)
    if start is None:
        return "random"
    return f"{start.folder}; Megatron's loader runs what is in it: load those you trust only"


def _positions_line(extension: ExtensionConfig) -> str:
    share = extension.plain_share
    plain = f", {100 * share:g} % of the samples plain" if share else ""
    return f"{extension.position_strategy}{plain}, seed {extension.position_seed}"


def _attention_factor_line(args: Namespace, scaling: RopeScaling) -> str:
    if scaling.attention_factor == 1.0:
        return "1"
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    where = "in the softmax scale" if scaling.dim == head_dim else "on the rotated dimensions"
    return f"{scaling.attention_factor:.6g}, {where}"


def _ends(ids: np.ndarray) -> str:
    return f"{' '.join(map(str, ids[:3]))} ... {' '.join(map(str, ids[-3:]))}"


def _chunks(layout: SampleLayout) -> str:
    runs = layout.runs()
    if runs is None:
        return "as many chunks as tokens"
    return "1 chunk" if len(runs) == 1 else f"{len(runs)} chunks"


def most_samples(strategy: Strategy) -> int:
    """Return how many layouts of a run coverage is counted over."""
    # Where each sample has a scale of its own, some may be plain.
    drawn = [strategy.layout(0, index).runs() for index in range(16)]
    pairs = [len(runs) * (len(runs) + 1) // 2 for runs in drawn if runs is not None]
    if len(pairs) < len(drawn):
        return _DENSE_SAMPLES
    return min(_SAMPLES, _PAIRS * len(pairs) // sum(pairs))


def _coverage_line(args: Namespace, extension: ExtensionConfig) -> str:
    strategy = extension.strategy()
    total = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    samples = max(1, min(total, most_samples(strategy)))
    found = coverage(strategy, samples, extension.position_seed)
    holes = "".join(f", never {a}..{b}" for a, b in found.holes[:3])
    more = f" and {len(found.holes) - 3} more ranges" if len(found.holes) > 3 else ""
    seen = f"the first {samples} of {total}" if samples < total else f"all {samples}"
    return f"{100 * found.covered:.1f} % of 1..T-1 in {seen} samples{holes}{more}"


A_FEW = 4
"""Times that a token is read from which a run is warned: a model then learns text by heart."""


def tokens_read(args: Namespace, extension: ExtensionConfig) -> list[str]:
    """Return a line for each training dataset: how many of its tokens are read, how often.

    A dataset with a mask has a second line, which share of its tokens has a loss.
    """
    total = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    found = list(training_sources(args, extension))
    sizes = [_epoch_size(extension, sources) for *_, sources in found]
    weights = [weight or size for (_, weight, _), size in zip(found, sizes, strict=True)]
    lines = []
    for (prefix, _, sources), size, weight in zip(found, sizes, weights, strict=True):
        if total and size:
            result = _repetition(extension, sources, total * weight / sum(weights) / size)
            lines.append(f"{_line(sources, result)}: {prefix}")
    return lines + [line for prefix, *_ in found for line in _mask_lines(prefix)]


def _mask_lines(prefix: str) -> list[str]:
    files = DatasetFiles.open(prefix, whole=False)
    if not files.masked:
        return []
    share = 100 * files.trained_tokens() / files.index.tokens
    return [f"loss on {share:.3g} % of the tokens of {prefix}"]


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
