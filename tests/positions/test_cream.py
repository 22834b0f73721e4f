# SPDX-License-Identifier: Apache-2.0
"""CREAM against formulas written out a second time, as lists of indices."""

import itertools
import math
import time

import numpy as np
import pytest

from megatron_cream.positions import make_strategy

N = 4096
PMF_F8 = {
    2: 0.0228, 3: 0.0250, 4: 0.0434, 5: 0.0674, 6: 0.0938, 7: 0.1169, 8: 0.1306, 9: 0.1306,
    10: 0.1169, 11: 0.0938, 12: 0.0674, 13: 0.0434, 14: 0.0250, 15: 0.0129, 16: 0.0098,
}  # fmt: skip


def cream(factor, **options):
    return make_strategy("cream", N, N * factor, **options)


def head_length(setting, factor):
    return N // 3 if setting == "relativity" else 4 * factor


def reference_positions(head, end, target):
    middle = N - 2 * head
    return [*range(head), *range(end - middle + 1, end + 1), *range(target - head, target)]


def reference_content(head, end, document):
    """Token indices: text follows positions unless the middle would run into the tail."""
    middle = N - 2 * head
    stop = end + 1 if end <= document - head - 1 else document - head
    return [*range(head), *range(stop - middle, stop), *range(document - head, document)]


def gathered(layout, document):
    return [i for offset, length in layout.spans(document) for i in range(offset, offset + length)]


def ends_to_try(head, half_windows):
    """The published range of the middle chunk's end, its bounds and two places inside it."""
    alpha = half_windows / 2
    low = int(head + (N - 2 * head - 1) * alpha)
    high = int(alpha * N) - head - 1
    return low, high, sorted({low, (2 * low + high) // 3, (low + 3 * high) // 4, high})


@pytest.mark.parametrize("setting", ["relativity", "continuity"])
@pytest.mark.parametrize("factor", [1, 2, 8, 64])
def test_given_draws_give_the_published_layout(factor, setting):
    strategy = cream(factor)
    head, target = head_length(setting, factor), N * factor
    assert head in strategy.heads
    for half_windows in sorted({2, 3, factor + 1, 2 * factor - 1, 2 * factor} & {*range(2, 129)}):
        if half_windows > 2 * factor:
            continue
        low, high, ends = ends_to_try(head, half_windows)
        assert strategy.middle_end_range(head, half_windows) == (low, high)
        for end in ends:
            layout = strategy.place(head, end)
            assert layout.position_ids.tolist() == reference_positions(head, end, target)
            for document in {N, 6000, 12000, target, 2 * target}:
                assert gathered(layout, document) == reference_content(head, end, document)


@pytest.mark.parametrize("factor", [1, 2, 8, 64])
def test_drawn_layouts_are_reference_layouts(factor):
    strategy = cream(factor)
    for index in range(50):
        layout = strategy.layout(seed=5, index=index)
        (_, head), (start, middle), _ = layout.chunks
        assert head in (N // 3, 4 * factor)
        end = start + middle - 1
        assert layout.position_ids.tolist() == reference_positions(head, end, N * factor)
        assert gathered(layout, 12000) == reference_content(head, end, 12000)


def test_factor_one_is_plain_text_at_plain_positions():
    layout = cream(1).layout(1, 2)
    assert layout.position_ids.tolist() == list(range(N))
    assert gathered(layout, N) == list(range(N))


def test_text_of_the_middle_never_repeats_the_tail():
    strategy = cream(8)
    for document in (N, N + 1, 6000, 8192, 12000, 20000):
        for index in range(300):
            content = gathered(strategy.layout(3, index), document)
            assert len(set(content)) == N


def test_text_follows_positions_in_a_document_of_the_target_length():
    layout = cream(8).layout(9, 9)
    assert gathered(layout, 8 * N) == layout.position_ids.tolist()


def test_published_probabilities():
    strategy = cream(8)
    probabilities = strategy.half_window_probabilities
    assert strategy.max_half_windows == 16
    assert probabilities == pytest.approx(list(PMF_F8.values()), abs=5e-4)
    mean = sum(r * p for r, p in enumerate(probabilities, start=2))
    assert mean == pytest.approx(8.51, abs=0.01)


def test_published_sigma_is_narrow_at_64x():
    cumulative = np.cumsum(cream(64).half_window_probabilities)
    assert np.searchsorted(cumulative, [0.01, 0.99]).tolist() == [58 - 2, 71 - 2]


@pytest.mark.parametrize("gaussian", ["clamped", "truncated"])
def test_relative_sigma_of_three_eighths_is_the_published_one_at_8x(gaussian):
    relative = cream(8, sigma_relative=3 / 8, gaussian=gaussian).half_window_probabilities
    assert relative == cream(8, sigma=3.0, gaussian=gaussian).half_window_probabilities


@pytest.mark.parametrize("factor", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.7}, {"sigma_relative": 0.375}])
def test_truncated_gaussian_is_centred_and_complete(factor, options):
    probabilities = cream(factor, gaussian="truncated", **options).half_window_probabilities
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    mean = math.fsum(r * p for r, p in enumerate(probabilities, start=2))
    assert mean == pytest.approx(1 + factor, abs=1e-9)


@pytest.mark.parametrize("factor", [1, 2, 8, 64, 256])
def test_clamped_probabilities_are_complete(factor):
    assert math.fsum(cream(factor).half_window_probabilities) == pytest.approx(1, abs=1e-12)


def exact_end_cdf(strategy, head):
    """P(end of the middle chunk <= position) for every position: a mixture of uniforms."""
    mass = np.zeros(strategy.target_length)
    for r, probability in enumerate(strategy.half_window_probabilities, start=2):
        low, high = strategy.middle_end_range(head, r)
        mass[low : high + 1] += probability / (high - low + 1)
    return np.cumsum(mass)


def largest_gap(ends, cdf):
    """Kolmogorov-Smirnov distance between sampled ends and an exact distribution."""
    counts = np.bincount(ends, minlength=len(cdf))
    return np.abs(np.cumsum(counts) / len(ends) - cdf).max()


@pytest.mark.parametrize(
    ("options", "other"),
    [({}, {"gaussian": "truncated"}), ({"gaussian": "truncated"}, {}), ({"sigma": 1.0}, {})],
)
def test_sampled_middles_follow_the_probabilities(options, other):
    strategy = cream(8, **options)
    chunks = [strategy.layout(1234, index).chunks for index in range(20_000)]
    relativity = np.mean([head == N // 3 for (_, head), _, _ in chunks])
    assert abs(relativity - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    for head in strategy.heads:
        ends = [s + length - 1 for (_, h), (s, length), _ in chunks if h == head]
        bound = 1.95 / math.sqrt(len(ends))  # exceeded once in a thousand seeds
        assert largest_gap(ends, exact_end_cdf(strategy, head)) < bound
        assert largest_gap(ends, exact_end_cdf(cream(8, **other), head)) > bound


def test_one_head_length_is_always_taken():
    strategy = cream(8, head_lengths=(100,))
    assert {strategy.layout(0, index).chunks[0] for index in range(50)} == {(0, 100)}


@pytest.mark.parametrize(("train", "target"), [(4095, 32767), (4097, 10000), (301, 2 * 301 - 1)])
def test_no_position_is_out_of_reach_at_odd_lengths(train, target):
    strategy = make_strategy("cream", train, target, gaussian="truncated")
    head = strategy.heads[0]
    assert strategy.middle_end_range(head, 2)[0] == train - head - 1
    assert strategy.middle_end_range(head, strategy.max_half_windows)[1] == target - head - 1
    for r in range(2, strategy.max_half_windows + 1):
        low, high = strategy.middle_end_range(head, r)
        assert low <= high


def test_head_lengths_as_a_list_of_any_integers():
    listed = cream(8, head_lengths=[np.int64(64), 32])
    given = cream(8, head_lengths=(64, 32))
    for index in range(5):
        assert listed.layout(1, index) == given.layout(1, index)


@pytest.mark.parametrize(
    ("train", "target", "options", "named"),
    [
        (256, 33 * 256, {}, "--cream-head-lengths"),
        (4096, 8192, {"head_lengths": (2048,)}, "--cream-head-lengths"),
        (4096, 8192, {"head_lengths": (0,)}, "--cream-head-lengths"),
        (4096, 8192, {"head_lengths": ()}, "--cream-head-lengths"),
        (2, 2, {}, "--cream-head-lengths"),
        (4096, 8192, {"sigma": 0.0}, "--cream-sigma"),
        (4096, 8192, {"sigma": math.nan}, "--cream-sigma"),
        (4096, 8192, {"sigma_relative": -1.0}, "--cream-sigma-relative"),
        (4096, 8192, {"sigma_relative": math.inf}, "--cream-sigma-relative"),
        (4096, 8192, {"gaussian": "round"}, "--cream-gaussian"),
    ],
)
def test_settings_that_do_not_fit_name_their_flag(train, target, options, named):
    with pytest.raises(ValueError, match=named):
        make_strategy("cream", train, target, **options)


def seconds_per_layout(strategy, bursts=12, count=250):
    """Best of several short bursts, so that a busy machine does not decide."""
    times = []
    indices = itertools.count()
    for _ in range(bursts):
        begin = time.process_time()
        for index in itertools.islice(indices, count):
            strategy.layout(1234, index).position_ids  # noqa: B018
        times.append((time.process_time() - begin) / count)
    return min(times)


def test_a_sample_costs_the_same_at_any_target_length():
    short, long = seconds_per_layout(cream(2)), seconds_per_layout(cream(64))
    assert 1 / long >= 20_000
    assert long < 3 * short


POWERS = [2**k + near for k in range(7, 19) for near in (-1, 0, 1)]


@pytest.mark.parametrize("target", [*range(9, 66), *POWERS])
def test_shortest_length_is_the_shortest_that_fits(target):
    """Of the lengths below it, none has room for two heads and a token between them."""
    shortest = make_strategy("cream", target, target).shortest_length
    assert shortest == next(n for n in range(3, target + 1) if 2 * (4 * target // n) < n)
    make_strategy("cream", shortest, target)
    with pytest.raises(ValueError, match="--cream-head-lengths"):
        make_strategy("cream", shortest - 1, target)


def test_shortest_length_with_given_heads():
    strategy = make_strategy("cream", 64, 512, head_lengths=(5, 9))
    assert strategy.shortest_length == 19
    make_strategy("cream", 19, 512, head_lengths=(5, 9))
