# SPDX-License-Identifier: Apache-2.0
"""Where training tokens pretend to stand. numpy only: no torch, no megatron.

    strategy = make_strategy("cream", train_length=4096, target_length=262144)
    layout = strategy.layout(seed=1234, index=7)   # pure: same arguments, same layout
    layout.position_ids                            # int64 [train_length]
    layout.spans(document_length)                  # [(offset, length), ...] tokens to read

make_strategy   a strategy by name: full, cream, pose, randpos
STRATEGIES      their classes by name
coverage        which relative distances a strategy trains, and how often
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions.contiguous import Full, RandPos
from megatron_cream.positions.coverage import Coverage, coverage
from megatron_cream.positions.cream import Cream
from megatron_cream.positions.layout import SampleLayout, Span, Strategy
from megatron_cream.positions.pose import Pose

__all__ = [
    "STRATEGIES",
    "Coverage",
    "SampleLayout",
    "Span",
    "Strategy",
    "coverage",
    "make_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Full, Cream, Pose, RandPos)}


def make_strategy(name: str, train_length: int, target_length: int, **options: Any) -> Strategy:
    """Return the strategy ``name`` for samples of N tokens that reach T positions.

    Args:
        name: ``full``, ``cream``, ``pose`` or ``randpos``.
        train_length: N, tokens in a sample.
        target_length: T, the window to reach, at least N.
        options: fields of the strategy's class, for instance ``sigma_relative=0.375``.

    Raises:
        UserError: an unknown name or option, or a value that cannot give a right layout.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"strategy (--position-strategy) is {name!r}: it must be one of {tuple(STRATEGIES)}"
        )
    cls = STRATEGIES[name]
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        allowed = sorted(known - {"train_length", "target_length"})
        raise UserError(f"strategy {name!r} has no option {unknown[0]!r}: it takes {allowed}")
    return cls(train_length=train_length, target_length=target_length, **options)
