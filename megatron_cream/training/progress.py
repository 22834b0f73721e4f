# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself while it goes on, next to what Megatron tells.

In TensorBoard and Weights & Biases, where Megatron writes them: on the last rank, every
--tensorboard-log-interval iterations:

positions/coverage         share of the distances 1..T-1 that the run has trained so far
positions/middle-third     share of the trained tokens that stood in the middle third of T
tokens-per-second          over all GPUs, since the last time; evaluations and saves count as time

Positions are a pure function of the sample's index, so nothing is asked of another rank: the
layouts of the samples trained since the last time are drawn once more, 0.1 ms each.

In the log, after 20 iterations: how long a step takes and how long the planner expected it to take.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from argparse import Namespace
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


WARM_UP, LAST = 4, 20
"""Iterations of a start that are not measured, in which kernels are compiled; the last that is."""


class StepReport:
    """Measures the iterations of a start; the median leaves evaluations and saves out.

    Args:
        planned: seconds per step, and the MFU of a step of that length.
    """

    def __init__(
        self, planned: tuple[float, float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.planned = planned
        self._clock = clock
        self._times: list[float] = []

    def after_iteration(self) -> str | None:
        """Return the line to print, once; call it at the end of each iteration."""
        if len(self._times) > LAST:
            return None
        self._times.append(self._clock())
        if len(self._times) != LAST:
            return None
        self._times.append(0.0)  # said
        ends = self._times[WARM_UP - 1 : LAST]
        measured = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
        seconds, mfu = self.planned
        return (
            f"step: planned {seconds:.3f} s, MFU {100 * mfu:.1f} %; measured {measured:.3f} s, MFU "
            f"{100 * mfu * seconds / measured:.1f} % (median of iterations {WARM_UP + 1} to {LAST})"
        )


def step_report(args: Namespace) -> StepReport | None:
    """Return the report of a run, or None where the planner does not know its model or GPU."""
    from megatron_cream.planning.cost import GPUS
    from megatron_cream.planning.stages import plan_of, why_not_estimated

    kind = None if args.cpu else kind_of_gpu()
    if kind is None or why_not_estimated(args) is not None:
        return None
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    plan, mfu = plan_of(args, GPUS[kind], node)
    return StepReport((plan.step.total, mfu))


def kind_of_gpu() -> str | None:
    """Return which of the planner's kinds this process computes on: whole SXM parts alone."""
    import torch

    from megatron_cream.planning.cost import GPUS

    name = torch.cuda.get_device_name().lower()
    words = set(re.split(r"[\s-]", name))  # GH200 is no H200
    if words & {"pcie", "nvl", "mig"}:
        return None
    return next((kind for kind in GPUS if kind in words), None)
