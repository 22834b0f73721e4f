# SPDX-License-Identifier: Apache-2.0
"""Measure SpanDataset beside Megatron's GPTDataset: start-up, samples per second from page cache.

    python tools/benchmark_dataset.py

Start-up is measured on a dataset of --documents documents whose tokens are a hole in the file;
samples are read in random order from a small one that fits in memory. The two take turns in one
process on one core, every 250 samples; figures are medians over the turns, in CPU seconds, so that
other work on the machine matters little. It still matters where cores share caches: "best" is the
best turn. "copies alone" makes tensors of a sample's size and types out of arrays that are there,
which no dataset can be faster than. GPTDataset keeps the index it builds of an epoch in files;
SpanDataset has none to keep.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.data.indexed import write_index

_BLOCK = 1 << 16
_TURN = 250  # samples


def main(argv: list[str]) -> int:
    """Print both figures of both datasets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--documents",
        type=int,
        default=1_000_000,
        help="of the dataset for start-up (default: 1000000)",
    )
    add("--seq-length", type=int, default=4096, help="N, tokens (default: 4096)")
    add("--target-length", type=int, default=32768, help="T of our samples (default: 32768)")
    add("--samples", type=int, default=5000, help="of a dataset (default: 5000)")
    add("--turns", type=int, default=5, help="times that all of them are read (default: 5)")
    args = parser.parse_args(argv)
    for name in ("documents", "seq_length", "samples", "turns"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            print(f"error: --{flag} {getattr(args, name)}: needs 1 or more", file=sys.stderr)
            return 2
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=".") as folder:
        large, small = str(Path(folder) / "large"), str(Path(folder) / "small")
        _write(large, args.documents, args.seq_length, hole=True)
        _write(small, 1000, 2 * args.target_length // 3, hole=False)
        _start_up(args, large)
        _samples(args, small)
    return 0


def _write(prefix: str, documents: int, mean: int, *, hole: bool) -> None:
    """Write a dataset of documents of 1/2 to 3/2 of ``mean`` tokens."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(mean // 2, 3 * mean // 2 + 1, size=documents)
    total = int(lengths.sum())
    with open(prefix + ".bin", "wb") as file:
        if hole:
            file.truncate(total * 2)
        else:
            file.write(rng.integers(0, 32000, size=total, dtype=np.uint16).tobytes())
    blocks = (
        (lengths[at : at + _BLOCK], np.ones(len(lengths[at : at + _BLOCK]), dtype=np.int64))
        for at in range(0, documents, _BLOCK)
    )
    write_index(prefix + ".idx", np.dtype(np.uint16), blocks, documents, documents)


def _start_up(args: argparse.Namespace, prefix: str) -> None:
    print(f"start-up on {args.documents} documents, CPU seconds, {args.samples} samples wanted")
    times: dict[str, list[float]] = {}
    for turn in range(-1, args.turns):  # imports fall into the first, which is not counted
        cache = f"{prefix}-cache-{turn}"
        for name, build in (*_BUILDERS.items(), ("GPTDataset, from its cache", _theirs)):
            began = time.process_time()
            build(args, prefix, cache)
            if turn >= 0:
                times.setdefault(name, []).append(time.process_time() - began)
    for name, seconds in times.items():
        print(f"  {name:<27} {statistics.median(seconds):8.3f}   best {min(seconds):.3f}")


def _samples(args: argparse.Namespace, prefix: str) -> None:
    print(f"samples of {args.seq_length} tokens per CPU second, one core")
    datasets = {name: build(args, prefix, prefix) for name, build in _BUILDERS.items()}
    datasets["copies alone"] = _Copies(args.seq_length)
    order = np.random.default_rng(2).permutation(args.samples).tolist()
    rates: dict[str, list[float]] = {}
    for turn in range(-1, args.turns):  # the first fills the page cache
        for begin in range(0, len(order), _TURN):
            for name, dataset in datasets.items():
                rate = _rate(dataset, order[begin : begin + _TURN])
                if turn >= 0:
                    rates.setdefault(name, []).append(rate)
    for name, rate in rates.items():
        print(f"  {name:<27} {statistics.median(rate):8.0f}   best {max(rate):.0f}")


def _rate(dataset: Any, indices: list[int]) -> float:
    """Return samples per CPU second."""
    began = time.process_time()
    for i in indices:
        dataset[i]
    return len(indices) / (time.process_time() - began)


class _Copies:
    """Tokens, labels, position ids and loss mask, copied from the same place each time."""

    def __init__(self, seq_length: int) -> None:
        kinds = (np.int64, np.int64, np.int64, np.float32)
        self.arrays = [np.zeros(seq_length, dtype=kind) for kind in kinds]

    def __getitem__(self, i: int) -> list[Any]:
        import torch

        return [torch.from_numpy(array.copy()) for array in self.arrays]


def _ours(args: argparse.Namespace, prefix: str, cache: str) -> Any:
    from megatron_cream.config import ExtensionConfig
    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig

    extension = ExtensionConfig(
        train_length=args.seq_length,
        target_length=args.target_length,
        original_length=args.seq_length,
        position_strategy="cream",
        sample_unit="window",
    )
    config = SpanDatasetConfig(
        random_seed=1,
        sequence_length=args.seq_length,
        blend=([prefix], None),
        split="100,0,0",
        extension=extension,
    )
    return _build(SpanDataset, config, args.samples)


def _theirs(args: argparse.Namespace, prefix: str, cache: str) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=32000
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=args.seq_length,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return _build(GPTDataset, config, args.samples)


def _build(kind: type, config: Any, samples: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    return BlendedMegatronDatasetBuilder(kind, [samples, 0, 0], lambda: True, config).build()[0]


_BUILDERS = {"SpanDataset": _ours, "GPTDataset": _theirs}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
