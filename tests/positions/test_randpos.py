# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from megatron_cream.positions import make_strategy


@pytest.mark.parametrize(("factor", "median"), [(8, 6), (64, 44)])
def test_gaps_are_geometric_around_the_factor(factor, median):
    strategy = make_strategy("randpos", 4096, 4096 * factor)
    gaps = np.concatenate([np.diff(strategy.layout(1, index).position_ids) for index in range(20)])
    assert gaps.min() >= 1
    assert gaps.mean() == pytest.approx(factor, rel=0.01)
    assert np.median(gaps) == pytest.approx(median, abs=1)
    assert np.mean(gaps == 1) == pytest.approx(1 / factor, rel=0.1)


def test_first_position_is_usually_not_zero():
    strategy = make_strategy("randpos", 256, 2048)
    first = np.array([strategy.layout(1, index).position_ids[0] for index in range(2000)])
    assert np.mean(first == 0) == pytest.approx(256 / 2048, abs=0.03)


def test_every_position_is_as_likely_as_any_other():
    strategy = make_strategy("randpos", 256, 2048)
    layouts = [strategy.layout(1, index).position_ids for index in range(4000)]
    counts = np.bincount(np.concatenate(layouts), minlength=2048)
    expected = 4000 * 256 / 2048
    # Each count is binomial; 5 deviations for the largest of 2048.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 1 / 8))


def test_a_full_window_is_plain_positions():
    assert make_strategy("randpos", 64, 64).layout(3, 3).position_ids.tolist() == list(range(64))


def test_text_is_the_beginning_of_the_document():
    assert make_strategy("randpos", 64, 640).layout(3, 3).spans(1000) == [(0, 64)]
