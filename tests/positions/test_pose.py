# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from megatron_cream.positions import make_strategy

N, T = 4096, 32768


def pose(train=N, target=T, **options):
    return make_strategy("pose", train, target, **options)


def gathered(layout, document):
    return [i for offset, length in layout.spans(document) for i in range(offset, offset + length)]


def chunk_lengths(layout):
    return [length for _, length in layout.chunks]


def skips(layout):
    """u_i: how far each chunk stands right of where plain positions would put it."""
    before = np.cumsum([0, *chunk_lengths(layout)[:-1]])
    return [start - int(b) for (start, _), b in zip(layout.chunks, before, strict=True)]


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov against the uniform integers of ``[low, high]``."""
    counts = np.bincount(np.asarray(values) - low, minlength=high - low + 1)
    assert len(counts) == high - low + 1
    exact = np.arange(1, high - low + 2) / (high - low + 1)
    gap = np.abs(np.cumsum(counts) / len(values) - exact).max()
    assert gap < 1.95 / math.sqrt(len(values))


@pytest.mark.parametrize("document", [N, 6000, 5 * N, T, 2 * T])
@pytest.mark.parametrize("first", [1, 700, N // 2])
@pytest.mark.parametrize("skip", [0, 1, 12345, T - N])
def test_given_draws_give_the_published_sample(first, skip, document):
    word = 0x9E3779B97F4A7C15
    end = N + (word * (document - N + 1) >> 64)  # the published rt2, uniform in [N, n]
    layout = pose().place((first, N - first), (0, skip), (word,))
    text = list(range(document))
    positions = list(range(N))
    positions[first:] = [p + skip for p in positions[first:]]
    assert layout.position_ids.tolist() == positions
    assert gathered(layout, document) == text[:first] + text[end - (N - first) : end]


def test_three_chunks_for_given_lengths_and_skips():
    layout = pose(10, 100, chunks=3).place((2, 3, 5), (0, 40, 90), (0, 2**63))
    assert layout.position_ids.tolist() == [0, 1, 42, 43, 44, 95, 96, 97, 98, 99]
    assert layout.spans(30) == [(0, 2), (2, 3), (15, 5)]  # v = 0, 0, 10 of at most 20


@pytest.mark.parametrize("train", [2, 3, 7, 8, 4096])
def test_trainer_rule_cuts_in_the_first_half(train):
    strategy = pose(train, 8 * train)
    first = [chunk_lengths(strategy.layout(2, index))[0] for index in range(2000)]
    assert_uniform(first, 1, (train + 1) // 2)


def test_paper_rule_cuts_anywhere():
    strategy = pose(lengths="paper")
    first = [chunk_lengths(strategy.layout(2, index))[0] for index in range(4000)]
    assert_uniform(first, 1, N - 1)


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("train", [16, 17, 4096])
def test_chunks_fill_the_sample(train, chunks):
    strategy = pose(train, 8 * train, chunks=chunks)
    for index in range(200):
        lengths = chunk_lengths(strategy.layout(3, index))
        assert len(lengths) == chunks
        assert sum(lengths) == train
        assert min(lengths) >= 1


def test_first_skip_is_zero_and_second_uniform():
    layouts = [pose().layout(1234, index) for index in range(5000)]
    assert {layout.chunks[0][0] for layout in layouts} == {0}
    assert_uniform([skips(layout)[1] for layout in layouts], 0, T - N)


def test_later_skips_halve_the_room():
    drawn = np.array([skips(pose(chunks=4).layout(7, index)) for index in range(4000)])
    assert (np.diff(drawn) >= 0).all()
    assert drawn.mean(axis=0) / (T - N) == pytest.approx([0, 1 / 2, 3 / 4, 7 / 8], abs=0.02)


@pytest.mark.parametrize("document", [N, N + 1, 9000, np.int64(9000), np.int32(100_000)])
def test_uniform_content_can_start_anywhere(document):
    offsets = []
    for index in range(2000):
        layout = pose().layout(1234, index)
        (start, first), (second, _) = layout.spans(document)
        assert start == 0
        offsets.append(second - first)
    assert_uniform(offsets, 0, int(document) - N)


def test_content_is_drawn_apart_from_the_positions():
    layouts = [pose().layout(1234, index) for index in range(2000)]
    offsets = [layout.spans(T)[1][0] - layout.chunks[0][1] for layout in layouts]
    moved = [skips(layout)[1] for layout in layouts]
    assert abs(np.corrcoef(offsets, moved)[0, 1]) < 4 / math.sqrt(2000)


def test_zero_content_is_the_beginning_of_the_document():
    for index in range(20):
        layout = pose(content="zero", chunks=3).layout(1, index)
        assert gathered(layout, 10 * N) == list(range(N))


def test_content_by_positions():
    for index in range(50):
        layout = pose(content="positions", chunks=3).layout(1, index)
        assert gathered(layout, T) == layout.position_ids.tolist()
        assert gathered(layout, 2 * T) == layout.position_ids.tolist()
        room = 9000 - N
        short = [
            i + min(skip, room)
            for (_, length), skip, before in zip(
                layout.chunks,
                skips(layout),
                np.cumsum([0, *chunk_lengths(layout)[:-1]]).tolist(),
                strict=True,
            )
            for i in range(before, before + length)
        ]
        assert gathered(layout, 9000) == short


def test_content_rules_leave_positions_alone():
    plain = pose().layout(4, 4).position_ids
    for content in ("zero", "positions"):
        assert (pose(content=content).layout(4, 4).position_ids == plain).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunks": 17}, "--pose-chunks"),
        ({"chunks": 0}, "--pose-chunks"),
        ({"content": "none"}, "--pose-content"),
        ({"lengths": "equal"}, "--pose-lengths"),
        ({"lengths": "trainer", "chunks": 3}, "--pose-chunks"),
    ],
)
def test_settings_that_do_not_fit_name_their_flag(options, named):
    with pytest.raises(ValueError, match=named):
        pose(16, 64, **options)


@pytest.mark.parametrize("chunks", [2, 3])
def test_skips_reach_the_end_of_the_window(chunks):
    """T - N itself is drawn: without it the last position of the window is never trained."""
    strategy = pose(16, 19, chunks=chunks)
    drawn = [skips(strategy.layout(1, index))[-1] for index in range(400)]
    assert set(drawn) == {0, 1, 2, 3}
    last = max(strategy.layout(1, index).position_ids[-1] for index in range(400))
    assert last == 18
