# SPDX-License-Identifier: Apache-2.0
"""Our scalars in TensorBoard and Weights & Biases, next to Megatron's own.

positions/coverage         share of the distances 1..T-1 that the run has trained so far
positions/middle-third     share of the trained tokens that stood in the middle third of T
tokens-per-second          over all GPUs, since the last time; evaluations and saves count as time

They are written where Megatron writes: on the last rank, every --tensorboard-log-interval
iterations. Positions are a pure function of the sample's index, so nothing is asked of another
rank: the layouts of the samples trained since the last time are drawn once more, 0.1 ms each.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_cream.config import ExtensionConfig
from megatron_cream.positions import Strategy
from megatron_cream.positions.coverage import Tally
from megatron_cream.training.start_block import most_samples

COVERAGE = "positions/coverage"
MIDDLE = "positions/middle-third"
TOKENS = "tokens-per-second"


class PositionsSoFar:
    """Distances and places that the first samples of a run trained, counted as it goes on.

    Counted over the samples after which coverage has converged, as in the block at start; beyond
    them the figures stay. After a resume the samples before it are counted as well.
    """

    def __init__(self, strategy: Strategy, seed: int) -> None:
        self.strategy = strategy
        self.seed = seed
        self.counted = 0
        self._most = most_samples(strategy)
        self._tally = Tally(strategy.target_length)

    def after(self, samples: int) -> dict[str, float]:
        """Return the figures of the run's first ``samples`` samples, never fewer than before."""
        for index in range(self.counted, min(samples, self._most)):
            self._tally.add(self.strategy.layout(self.seed, index))
            self.counted = index + 1
        if not self.counted:
            return {}
        return {COVERAGE: self._tally.covered, MIDDLE: self._tally.token_thirds[1]}


class Scalars:
    """What is written at an iteration.

    Where documents are packed each has a layout of its own, which only the rank that reads them
    can tell: then there is the rate alone.
    """

    def __init__(self, extension: ExtensionConfig, clock: Callable[[], float] = time.perf_counter):
        self.train_length = extension.train_length
        self.positions = None
        if extension.sample_unit != "packed-documents":
            self.positions = PositionsSoFar(extension.strategy(), extension.position_seed)
        self._clock = clock
        self._last: tuple[float, int] | None = None

    def at(self, samples: int) -> dict[str, float]:
        """Return values by name after ``samples`` samples of the run, all its starts together."""
        now = self._clock()
        values = self.positions.after(samples) if self.positions else {}
        if self._last is not None and now > self._last[0]:
            tokens = (samples - self._last[1]) * self.train_length
            values[TOKENS] = tokens / (now - self._last[0])
        self._last = (now, samples)
        return values
