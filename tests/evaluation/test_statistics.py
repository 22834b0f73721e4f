# SPDX-License-Identifier: Apache-2.0
"""Intervals against published values and simulations."""

import math

import numpy as np
import pytest

from megatron_cream.evaluation.results import effective_count, t_interval, wilson


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)],
)
def test_wilson(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_student():
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(t_interval([1.0])[0])


def test_cases_that_fail_together_count_once():
    groups = np.repeat(range(20), 5)
    together = np.repeat(np.arange(20) % 2, 5)
    assert effective_count(together, groups) == pytest.approx(20, abs=2)
    apart = np.tile([0, 1, 1, 0, 1], 20)
    assert effective_count(apart, groups) == 100
    assert effective_count([1] * 10, range(10)) == 10


def test_interval_of_shared_haystacks_covers():
    """Of shares simulated with whole haystacks as units, about 95 % lie in the interval."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        chances = rng.choice([0.1, 0.9], size=30)  # a haystack is easy or hard
        hits = rng.random((30, 5)) < chances[:, None]
        count = effective_count(hits.ravel(), np.repeat(range(30), 5))
        low, high = wilson(hits.mean(), count)
        inside += low <= 0.5 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_effective_count_is_the_design_effect_of_few_groups():
    """Kish's effect with n / (n - 1): of two groups the factor is 2, and nothing else says so."""
    values, groups = [1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]
    mean, count = 0.5, 8
    sums = [3 - 4 * mean, 1 - 4 * mean]
    clustered = sum(s * s for s in sums) / count**2 * 2 / (2 - 1)
    effect = clustered / (0.25 / count)
    assert effect == 2  # without the factor it would be 1, and all 8 cases would count
    assert effective_count(values, groups) == pytest.approx(count / effect)


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (3, 4.303), (16, 2.131), (31, 2.042), (41, 2.021), (121, 1.980)]
)
def test_student_by_degrees_of_freedom(count, t):
    values = [float(i % 2) for i in range(count)]
    low, high = t_interval(values)
    deviation = float(np.std(values, ddof=1))
    assert (high - low) / 2 == pytest.approx(t * deviation / math.sqrt(count), rel=1e-3)
