# SPDX-License-Identifier: Apache-2.0
"""Measure SpanDataset beside Megatron's GPTDataset: start-up, and samples, warm and cold.

    python tools/benchmark_dataset.py
    python tools/benchmark_dataset.py --documents 100000000 --turns 1

Start-up is measured on datasets of --documents documents whose tokens are a hole in the file, each
time in a process of its own: CPU seconds, the peak of its memory (mapped files too) and what it
keeps for itself alone, as each rank does. Both datasets keep their index in files; the second line
of each starts from them.

Samples are read in random order from a file that fits in memory. The two take turns in one process
on one core, every 250 samples; figures are medians over the turns, in CPU seconds, so that other
work on the machine matters little. It still matters where cores share caches: "best" is the best
turn. "copies alone" makes tensors of a sample's size and types out of arrays that are there, which
no dataset can be faster than.

Cold samples are read from a file of --cold-gigabytes that is dropped from the page cache before
each turn, in seconds of the clock: they depend on the disk. "system's read-ahead" is SpanDataset
without its advice about how it reads.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.storage import write_index

_BLOCK = 1 << 16
_TURN = 250  # samples
_COLD_SECONDS = 3


def main(argv: list[str]) -> int:
    """Print both figures of both datasets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--documents",
        type=int,
        nargs="+",
        default=[1_000_000],
        help="of each dataset for start-up (default: 1000000)",
    )
    add("--seq-length", type=int, default=4096, help="N, tokens (default: 4096)")
    add("--target-length", type=int, default=32768, help="T of our samples (default: 32768)")
    add("--samples", type=int, default=5000, help="of a dataset (default: 5000)")
    add("--turns", type=int, default=5, help="times that all of them are read (default: 5)")
    add(
        "--cold-gigabytes",
        type=int,
        default=2,
        help="of the file of cold samples; 0 for none (default: 2)",
    )
    args = parser.parse_args(argv)
    least = {"seq_length": 1, "samples": 1, "turns": 1, "cold_gigabytes": 0}
    for name, needed in [*least.items(), ("documents", 1)]:
        found = getattr(args, name)
        found = min(found) if name == "documents" else found
        if found < needed:
            flag = name.replace("_", "-")
            print(f"error: --{flag} {found}: needs {needed} or more", file=sys.stderr)
            return 2
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=".") as folder:
        _samples(args, str(Path(folder) / "small"))
        if args.cold_gigabytes:
            _cold_samples(args, str(Path(folder) / "cold"))
        for documents in args.documents:
            _start_up(args, documents, str(Path(folder) / f"large-{documents}"))
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
            for at in range(0, total, 1 << 24):
                size = min(1 << 24, total - at)
                file.write(rng.integers(0, 32000, size=size, dtype=np.uint16).data)
    blocks = (
        (lengths[at : at + _BLOCK], np.ones(len(lengths[at : at + _BLOCK]), dtype=np.int64))
        for at in range(0, documents, _BLOCK)
    )
    write_index(prefix + ".idx", np.dtype(np.uint16), blocks, documents, documents)


def _start_up(args: argparse.Namespace, documents: int, prefix: str) -> None:
    print(f"start-up on {documents} documents, {args.samples} samples wanted")
    _write(prefix, documents, args.seq_length, hole=True)
    found: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(args.turns):
        for name, build in _BUILDERS.items():
            for start in (name, f"{name}, from its files"):
                measured = _apart(_start, build, args, prefix, prefix + "-cache")
                found.setdefault(start, []).append(measured)
        shutil.rmtree(prefix + "-cache")
    print(f"  {'':<27} {'CPU s':>8} {'best':>8} {'peak GB':>8} {'kept GB':>8}")
    for start, rows in found.items():
        cpu, peak, kept = (statistics.median(column) for column in zip(*rows, strict=True))
        best = min(rows)[0]
        print(f"  {start:<27} {cpu:8.3f} {best:8.3f} {peak:8.2f} {kept:8.2f}")
    for suffix in (".bin", ".idx"):
        os.unlink(prefix + suffix)


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a fork of this process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=lambda: there.send(function(*arguments)))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _start(
    build: Callable[..., Any], args: argparse.Namespace, prefix: str, cache: str
) -> tuple[float, float, float]:
    """Return CPU seconds, and GB at the peak and kept, of a dataset with its first sample."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of before
    before, own = _status("VmRSS"), _private()
    began = time.process_time()
    dataset = build(args, prefix, cache)
    seconds = time.process_time() - began
    dataset[0]
    return seconds, (_status("VmHWM") - before) / 1e6, (_private() - own) / 1e6


def _status(name: str) -> int:
    """Return a line of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def _private() -> int:
    """Return the kB of this process that are not mapped from a file, which all would share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def _cold_samples(args: argparse.Namespace, prefix: str) -> None:
    print(f"cold samples of {args.seq_length} tokens per second, from {args.cold_gigabytes} GB")
    mean = 2 * args.target_length // 3
    _write(prefix, max(args.cold_gigabytes * 10**9 // (2 * mean), 2), mean, hole=False)
    sides = {**_BUILDERS, "system's read-ahead": _without_advice}
    rates: dict[str, list[float]] = {}
    for turn in range(args.turns):
        for name, build in sides.items():
            rates.setdefault(name, []).append(_apart(_cold_rate, build, args, prefix, turn))
    for name, rate in rates.items():
        print(f"  {name:<27} {statistics.median(rate):8.0f}   best {max(rate):.0f}")


def _cold_rate(
    build: Callable[..., Any], args: argparse.Namespace, prefix: str, turn: int
) -> float:
    """Return samples per second of a dataset whose tokens are on the disk alone."""
    with open(prefix + ".bin", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dataset = build(args, prefix, prefix + "-cache")
    order = np.random.default_rng(turn).integers(0, args.samples, size=args.samples).tolist()
    began, read = time.monotonic(), 0
    while read < len(order) and time.monotonic() - began < _COLD_SECONDS:
        dataset[order[read]]
        read += 1
    return read / (time.monotonic() - began)


def _without_advice(args: argparse.Namespace, prefix: str, cache: str) -> Any:
    dataset = _ours(args, prefix, cache)
    dataset.reader._file._map.madvise(mmap.MADV_NORMAL)
    dataset.reader._file.read_ahead = lambda spans: None
    return dataset


def _samples(args: argparse.Namespace, prefix: str) -> None:
    print(f"samples of {args.seq_length} tokens per CPU second, one core")
    _write(prefix, 1000, 2 * args.target_length // 3, hole=False)
    datasets = {name: build(args, prefix, prefix + "-cache") for name, build in _BUILDERS.items()}
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
        path_to_cache=cache,
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
