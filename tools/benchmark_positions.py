# SPDX-License-Identifier: Apache-2.0
"""Measure how many CREAM samples a second one core draws, and that T does not matter.

    python tools/benchmark_positions.py

A draw is a layout with its position ids. Beside it, in the same run, stands what a preprocessing
step does that converts the whole document of T tokens for every sample and picks its N tokens by
index. Medians over rounds in which the variants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from megatron_cream.positions import Strategy, make_strategy

TRAIN_LENGTH = 4096
TARGETS = (8192, 32768, 262144, 1048576)


def main() -> None:
    """Print a row for each target length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    cases = {target: make_strategy("cream", TRAIN_LENGTH, target) for target in TARGETS}
    documents = {target: list(range(target)) for target in TARGETS}
    drawn = {target: [] for target in TARGETS}
    gathered = {target: [] for target in TARGETS}
    for _ in range(rounds):
        for target, strategy in cases.items():
            drawn[target].append(_rate(partial(_draw, strategy), 3000))
            gathered[target].append(_rate(partial(_gather, strategy, documents[target]), 3))
    medians = {target: statistics.median(rates) for target, rates in drawn.items()}
    print(f"N = {TRAIN_LENGTH}, CREAM, one core, medians of {rounds} rounds")
    print(f"{'T':>9} {'layouts/s':>10} {'of T=8192':>10} {'gather/s':>9} {'ratio':>7}")
    for target, rate in medians.items():
        slow = statistics.median(gathered[target])
        share = rate / medians[TARGETS[0]]
        print(f"{target:>9} {rate:>10.0f} {share:>10.2f} {slow:>9.0f} {rate / slow:>7.0f}")


def _rate(draw: Callable[[int], np.ndarray], count: int) -> float:
    started = time.process_time()
    for i in range(count):
        draw(i)
    return count / (time.process_time() - started)


def _draw(strategy: Strategy, index: int) -> np.ndarray:
    return strategy.layout(1234, index).position_ids


def _gather(strategy: Strategy, document: list[int], index: int) -> np.ndarray:
    spans = strategy.layout(1234, index).spans(len(document))
    picked = np.concatenate([np.arange(offset, offset + n) for offset, n in spans])
    return np.array(document)[picked]


if __name__ == "__main__":
    main()
