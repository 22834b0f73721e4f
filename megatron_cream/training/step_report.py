# SPDX-License-Identifier: Apache-2.0
"""Says after 20 iterations how long a step takes and how long the planner expected it to take."""

from __future__ import annotations

import os
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Callable

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
    from megatron_cream.planning.expected import plan_of
    from megatron_cream.planning.stages import why_not_estimated

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
