# SPDX-License-Identifier: Apache-2.0
"""Prints at start what a run will do: the settings as they will be used."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

from megatron_cream.checkpoint.loading import find_start
from megatron_cream.config import ExtensionConfig
from megatron_cream.extras.rotation import rope_kernel
from megatron_cream.mcore import patches
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.positions import SampleLayout, Strategy, coverage
from megatron_cream.rope import RopeScaling
from megatron_cream.training.tokens_read import tokens_read

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
