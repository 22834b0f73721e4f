# SPDX-License-Identifier: Apache-2.0
"""Draws the positions that training tokens are given. numpy only: no torch, no megatron.

    strategy = make_strategy("cream", train_length=4096, target_length=262144)
    layout = strategy.layout(seed=1234, index=7)   # pure: same arguments, same layout
    layout.position_ids                            # int64 [train_length]
    layout.spans(document_length)                  # [(offset, length), ...] tokens to read

make_strategy   a strategy by name: full, cream, pose, randpos, scatter
STRATEGIES      their classes by name, each with its options
coverage        which relative distances a strategy trains, and how often

A new strategy is one subclass of ``Strategy``; see ``strategy``.
"""

from megatron_cream.positions.coverage import Coverage, coverage
from megatron_cream.positions.cream import Cream
from megatron_cream.positions.skips import Pose, Scatter
from megatron_cream.positions.strategy import (
    STRATEGIES,
    Full,
    RandPos,
    SampleLayout,
    Span,
    Strategy,
    make_strategy,
)

__all__ = [
    "STRATEGIES",
    "Coverage",
    "Cream",
    "Full",
    "Pose",
    "RandPos",
    "SampleLayout",
    "Scatter",
    "Span",
    "Strategy",
    "coverage",
    "make_strategy",
]
