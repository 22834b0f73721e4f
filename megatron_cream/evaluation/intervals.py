# SPDX-License-Identifier: Apache-2.0
"""Computes 95 % intervals of shares and of perplexities, over cases that may share a haystack."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

_NORMAL = 1.959964
# Student's t at 97.5 % for 1 .. 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

_LARGEST = 709.0  # exp of more is no float


def perplexity_of(nll: float) -> float:
    """Return ``exp(nll)``, infinite where a broken model's is more than a float holds."""
    return math.exp(nll) if nll < _LARGEST or math.isnan(nll) else math.inf


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share seen in ``count`` independent cases."""
    z2 = _NORMAL**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_count(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return how many independent cases ``values`` are worth.

    Cases that share a haystack succeed and fail together. Their number is divided by the design
    effect: the variance of the mean with whole groups for units, over that of independent cases.
    It is never below the number of groups, nor above that of cases.
    """
    array = np.asarray(values, dtype=float)
    names = sorted(set(groups), key=str)
    spread = float(array.var())
    if len(names) < 2 or spread == 0:
        return float(len(array))
    residuals = array - array.mean()
    member = np.array([names.index(group) for group in groups])
    sums = np.bincount(member, residuals)
    clustered = (sums**2).sum() / len(array) ** 2 * len(names) / (len(names) - 1)
    effect = clustered / (spread / len(array))
    return float(min(len(array), max(len(names), len(array) / effect))) if effect else len(array)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's interval of the mean; NaN for one value."""
    count = len(values)
    if count < 2:
        return math.nan, math.nan
    degrees = count - 1
    t = _T[degrees - 1] if degrees <= len(_T) else _NORMAL + 2.45 / degrees
    half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    mean = float(np.mean(values))
    return mean - half, mean + half


def perplexity_interval(nll: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the ends of Student's interval of a mean in nats, as perplexities; None of one."""
    low, high = t_interval(nll)
    return (None, None) if math.isnan(low) else (perplexity_of(low), perplexity_of(high))
