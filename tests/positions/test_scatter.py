# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from megatron_cream.errors import UserError
from megatron_cream.positions import coverage, make_strategy

N, T = 512, 4096


def scatter(train=N, target=T, **options):
    return make_strategy("scatter", train, target, **options)


def test_given_cuts_and_shifts():
    layout = scatter(10, 100).place([2, 5], [40, 90])
    assert layout.position_ids.tolist() == [0, 1, 42, 43, 44, 95, 96, 97, 98, 99]
    assert layout.spans(100) == [(0, 2), (42, 3), (95, 5)]  # the text of the positions
    assert layout.spans(55) == [(0, 2), (2 + 20, 3), (5 + 45, 5)]  # half as much room
    assert layout.spans(10) == [(0, 2), (2, 3), (5, 5)]


@pytest.mark.parametrize("target", [N, N + 1, T, 200 * N + 7])
def test_a_sample_begins_and_ends_its_window(target):
    strategy = scatter(target=target)
    for index in range(300):
        ids = strategy.layout(3, index).position_ids
        assert (ids[0], ids[-1]) == (0, target - 1)


def test_numbers_of_chunks_are_uniform_by_their_logarithm():
    strategy = scatter(most_chunks=33)
    counts = np.array([len(strategy.layout(5, index).chunks) - 1 for index in range(4000)])
    shares = [np.mean((counts >= a) & (counts < 2 * a)) for a in (2, 4, 8, 16)]
    # A few of many cuts fall on one place.
    assert max(shares) - min(shares) < 0.06 and counts.max() <= 32
    assert 0.17 < np.mean(counts == 1) < 0.23


def test_the_end_of_a_sample_sees_text_from_all_distances():
    """In each sample of many chunks, where CREAM's end sees two places."""

    def seen(name):
        strategy = make_strategy(name, N, T)
        thirds = []
        for index in range(200):
            back = T - 1 - strategy.layout(1, index).position_ids
            thirds.append(all(((back * 6 // T) == part).any() for part in range(6)))
        return np.mean(thirds)

    assert seen("scatter") > 0.2
    assert seen("cream") == 0


def test_every_distance_is_trained():
    assert coverage(scatter(), 300, 1).covered == 1


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match=r"most_chunks \(--scatter-most-chunks\) is 1"):
        scatter(most_chunks=1)
    with pytest.raises(UserError, match="--seq-length.* is 1: scatter needs at least 2"):
        scatter(1, 8)
    assert scatter(2, 8).layout(1, 1).position_ids.tolist() == [0, 7]
