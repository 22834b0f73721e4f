# SPDX-License-Identifier: Apache-2.0
"""Measure how many CREAM samples per second one core draws, and that T does not matter.

    python tools/benchmark_positions.py

Drawn: the layout (which spans to read, where they stand). With ids: its N position ids as an array,
too. Beside it, in the same run, stands what a preprocessing step does that converts the whole
document of T tokens for every sample and picks its N tokens by index; the ratio is to that. Medians
over rounds in which the variants take turns.
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
    parser.add_argument("--rounds", type=int, default=15, help="of each side (default: 15)")
    rounds = parser.parse_args().rounds
    cases = {target: make_strategy("cream", TRAIN_LENGTH, target) for target in TARGETS}
    documents = {target: list(range(target)) for target in TARGETS}
    rates = {target: {"drawn": [], "with ids": [], "gather": []} for target in TARGETS}
    for _ in range(rounds):
        for target, strategy in cases.items():
            found = rates[target]
            found["drawn"].append(_rate(partial(strategy.layout, 1234), 3000))
            found["with ids"].append(_rate(partial(_ids, strategy), 3000))
            found["gather"].append(_rate(partial(_gather, strategy, documents[target]), 3))
    print(f"N = {TRAIN_LENGTH}, CREAM, samples per second on one core, medians of {rounds} rounds")
    print(f"{'T':>9} {'drawn':>8} {'with ids':>9} {'of T=8192':>10} {'gather':>7} {'ratio':>6}")
    first = statistics.median(rates[TARGETS[0]]["with ids"])
    for target, found in rates.items():
        drawn, ids, gather = (statistics.median(values) for values in found.values())
        print(
            f"{target:>9} {drawn:>8.0f} {ids:>9.0f} {ids / first:>10.2f} {gather:>7.0f} "
            f"{ids / gather:>6.0f}"
        )


def _rate(draw: Callable[[int], object], count: int) -> float:
    started = time.process_time()
    for i in range(count):
        draw(i)
    return count / (time.process_time() - started)


def _ids(strategy: Strategy, index: int) -> np.ndarray:
    return strategy.layout(1234, index).position_ids


def _gather(strategy: Strategy, document: list[int], index: int) -> np.ndarray:
    spans = strategy.layout(1234, index).spans(len(document))
    picked = np.concatenate([np.arange(offset, offset + n) for offset, n in spans])
    return np.array(document)[picked]


if __name__ == "__main__":
    main()
