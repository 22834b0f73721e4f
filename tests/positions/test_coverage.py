# SPDX-License-Identifier: Apache-2.0
"""Coverage against all pairs counted one by one."""

import numpy as np
import pytest

from megatron_cream.positions import coverage, make_strategy

CASES = [
    ("full", 12, 40, {}),
    ("full", 9, 9, {}),
    ("full", 1, 5, {}),
    ("cream", 24, 24, {}),
    ("cream", 36, 100, {}),
    ("cream", 37, 101, {"gaussian": "truncated"}),
    ("cream", 48, 217, {"head_lengths": (1, 23), "sigma": 0.2}),
    ("pose", 20, 90, {}),
    ("pose", 20, 90, {"chunks": 5}),
    ("pose", 7, 30, {"chunks": 7}),
    ("pose", 16, 64, {"chunks": 1}),
    ("randpos", 10, 77, {}),
    ("randpos", 5, 300, {}),
    ("randpos", 8, 8, {}),
]


def brute_force(strategy, samples, seed):
    """(samples, pairs) by distance, from every pair of position ids."""
    target = strategy.target_length
    sample_counts = np.zeros(target, dtype=np.int64)
    pair_counts = np.zeros(target)
    for index in range(samples):
        ids = strategy.layout(seed, index).position_ids
        distances = (ids[:, None] - ids[None, :])[np.tril_indices(len(ids))]
        sample_counts[np.unique(distances)] += 1
        np.add.at(pair_counts, distances, 1)
    return sample_counts, pair_counts


@pytest.mark.parametrize(("name", "train", "target", "options"), CASES)
@pytest.mark.parametrize("samples", [1, 3, 40])
def test_counts_equal_all_pairs(name, train, target, options, samples):
    strategy = make_strategy(name, train, target, **options)
    result = coverage(strategy, samples, seed=11)
    sample_counts, pair_counts = brute_force(strategy, samples, 11)
    assert result.samples == samples
    assert result.target_length == target
    assert result.sample_counts.dtype == np.int64
    assert result.pair_counts.dtype == np.float64
    np.testing.assert_array_equal(result.sample_counts, sample_counts)
    np.testing.assert_array_equal(result.pair_counts, pair_counts)
    missing = [d for d in range(1, target) if sample_counts[d] == 0]
    assert [d for low, high in result.holes for d in range(low, high + 1)] == missing
    assert result.covered == pytest.approx(1 - len(missing) / max(target - 1, 1))


@pytest.mark.parametrize(("name", "train", "target", "options"), CASES)
def test_trained_positions_by_third(name, train, target, options):
    strategy = make_strategy(name, train, target, **options)
    ids = np.concatenate([strategy.layout(2, index).position_ids for index in range(30)])
    shares = np.bincount(3 * ids // target, minlength=3) / len(ids)
    assert coverage(strategy, 30, seed=2).token_thirds == pytest.approx(tuple(shares))


def test_holes_are_whole_ranges():
    result = coverage(make_strategy("full", 12, 40), 2)
    assert result.holes == [(12, 39)]
    assert result.covered == pytest.approx(11 / 39)
    assert coverage(make_strategy("full", 40, 40), 2).holes == []


def test_target_of_one_token_has_no_distance():
    result = coverage(make_strategy("full", 1, 1), 3)
    assert (result.covered, result.holes) == (1.0, [])


def test_middle_centres_count_middles_that_touch_the_head():
    strategy = make_strategy("cream", 36, 100)
    result = coverage(strategy, 400, seed=1)
    chunks = [strategy.layout(1, index).chunks for index in range(400)]
    assert any(head[1] == middle[0] for head, middle, _ in chunks)
    expected = [start + (length - 1) / 2 for _, (start, length), _ in chunks]
    assert result.middle_centres.tolist() == expected
    assert sum(result.middle_thirds) == pytest.approx(1)


def test_two_chunks_have_no_middle():
    assert coverage(make_strategy("pose", 20, 90), 5).middle_thirds is None
    assert coverage(make_strategy("randpos", 20, 90), 5).middle_thirds is None


@pytest.mark.parametrize(("factor", "share"), [(8, 0.507), (64, 0.739)])
def test_published_middle_focus(factor, share):
    strategy = make_strategy("cream", 4096, 4096 * factor)
    assert coverage(strategy, 4000).middle_thirds[1] == pytest.approx(share, abs=0.03)


def test_published_sigma_leaves_a_quarter_of_the_distances_at_64x():
    result = coverage(make_strategy("cream", 4096, 262144), 4000)
    assert 0.2 < 1 - result.covered < 0.35
    assert len(result.holes) == 2


def test_relative_sigma_leaves_no_hole_at_64x():
    strategy = make_strategy("cream", 4096, 262144, sigma_relative=0.375)
    assert coverage(strategy, 32_000).holes == []


def test_published_sigma_leaves_no_hole_at_8x():
    assert coverage(make_strategy("cream", 4096, 32768), 4000).holes == []


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(samples):
    with pytest.raises(ValueError, match="--samples"):
        coverage(make_strategy("full", 4, 8), samples)
