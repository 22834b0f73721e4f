# SPDX-License-Identifier: Apache-2.0
"""Mixtures: a share of plain samples; one scale per sample, its reach, apart from other draws."""

import numpy as np
import pytest

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.positions import coverage, make_strategy, philox
from megatron_cream.positions.mixtures import PlainLayout, ScalePerSample

N, T = 256, 2048


def extension(**changes):
    settings = {"position_strategy": "cream", "rope_interpolation": "yarn", "rope_factor": 8.0}
    return ExtensionConfig(N, T, N, **settings | changes)


def test_that_share_of_the_samples_is_plain_and_the_rest_as_without_it():
    mixed, cream = extension(plain_share=0.25).strategy(), extension().strategy()
    plain = 0
    for index in range(4000):
        layout = mixed.layout(7, index)
        if mixed.is_plain(7, index):
            plain += 1
            assert (layout.position_ids == np.arange(N)).all()
        else:
            assert layout == cream.layout(7, index)
    assert abs(plain / 4000 - 0.25) < 0.03


def test_a_plain_sample_reads_one_window_anywhere_in_its_text():
    mixed = extension(plain_share=1.0).strategy()
    starts = []
    for index in range(2000):
        ((start, length),) = mixed.layout(7, index).spans(T)
        assert length == N
        starts.append(start)
    assert min(starts) < 20 and max(starts) > T - N - 20
    assert abs(np.mean(starts) - (T - N) / 2) < 40
    assert mixed.layout(7, 0).spans(N) == [(0, N)]


def test_the_coin_is_a_pure_function_of_seed_and_index():
    a, b = (extension(plain_share=0.5).strategy() for _ in range(2))
    drawn = [a.is_plain(7, index) for index in range(200)]
    assert drawn[::-1] == [b.is_plain(7, index) for index in reversed(range(200))]
    assert drawn != [a.is_plain(8, index) for index in range(200)]


def test_words_of_a_stream_are_philox_at_that_counter():
    for stream in (0, 4):
        key, counter = np.array([7, 3], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        expected = np.random.Philox(key=key, counter=counter).random_raw(5).tolist()
        assert philox.words(7, 3, 5, stream) == expected
    assert philox.words(7, 3, 5) == philox.words(7, 3, 5, 0) != philox.words(7, 3, 5, 4)


def test_the_share_is_in_the_saved_settings_and_in_the_coverage():
    saved = extension(plain_share=0.25)
    assert ExtensionConfig.from_dict(saved.to_dict()) == saved
    assert saved.differences(extension()) == ["--plain-share 0.25 != 0.0"]
    older = extension().to_dict()
    del older["plain_share"]
    assert ExtensionConfig.from_dict(older) == extension()
    near, far = (
        coverage(extension(plain_share=share).strategy(), 500).sample_counts for share in (0.5, 0.0)
    )
    assert (near[1:N] >= far[1:N]).all()
    assert near[N + 1 :].sum() < far[N + 1 :].sum()


def test_packed_documents_of_any_length_may_be_plain():
    mixed = extension(plain_share=1.0, sample_unit="packed-documents").strategy()
    size = mixed.shortest_length
    short = mixed.for_length(size).layout(7, 0)
    assert isinstance(short, PlainLayout) and short.spans(size) == [(0, size)]
    assert mixed.shortest_length == make_strategy("cream", N, T).shortest_length


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plain_share": 1.5}, "--plain-share.*1.5.*0 to 1"),
        ({"plain_share": -0.1}, "--plain-share.*-0.1"),
        ({"plain_share": float("nan")}, "--plain-share.*nan"),
        ({"plain_share": 0.5, "rope_interpolation": "clex"}, "--plain-share.*0.5.*clex"),
    ],
)
def test_a_share_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        extension(**changes)


SCALES = (1.0, 2.0, 4.0, 8.0)


def scaled(train=16, original=32, scales=SCALES, inner="randpos", **options):
    target = round(max(scales) * original)
    return ScalePerSample(
        train, target, original_length=original, scales=scales, inner=inner,
        options=tuple(options.items()),
    )  # fmt: skip


def test_scales_are_uniform_and_all_of_them():
    strategy = scaled()
    drawn = [strategy.scale(7, index) for index in range(4000)]
    counts = np.array([drawn.count(scale) for scale in SCALES])
    assert counts.sum() == 4000
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


def test_a_sample_is_the_inner_strategy_at_its_scale():
    strategy = scaled()
    for index in range(60):
        scale = strategy.scale(7, index)
        wanted = make_strategy("randpos", 16, round(32 * scale)).layout(7, index)
        assert strategy.layout(7, index).position_ids.tolist() == wanted.position_ids.tolist()


def test_the_scale_is_drawn_apart_from_layout_and_shuffling():
    """Each of these draws from a generator of (seed, index) as well; none may decide another."""
    strategy = scaled(scales=tuple(float(i + 1) for i in range(64)))
    own = [strategy.scale(7, index) for index in range(300)]
    for stream in (0, 1):
        other = [1.0 + int(philox.generator(7, i, stream).integers(64)) for i in range(300)]
        same = np.mean([a == b for a, b in zip(own, other, strict=True)])
        assert same < 0.1


def test_text_is_chosen_from_what_the_largest_scale_reaches():
    strategy = scaled(inner="cream", train=48, original=64, scales=(1.0, 2.0, 4.0))
    assert strategy.content_length == strategy.target_length == 256
    assert strategy.strategies[0].content_length == 64


def test_shortest_length_holds_at_every_scale():
    strategy = scaled(inner="pose", chunks=3)
    assert strategy.shortest_length == 3
    strategy = scaled(inner="cream", train=48, original=64, scales=(1.0, 2.0, 4.0))
    assert strategy.shortest_length == max(s.shortest_length for s in strategy.strategies)
    assert strategy.shortest_length > strategy.strategies[0].shortest_length


@pytest.mark.parametrize(
    ("scale", "reach"), [(0.1, 16), (1.0, 32), (1.5, 48), (8.0, 256), (9.0, 256)]
)
def test_reach_is_between_sample_and_window(scale, reach):
    assert scaled().reach(scale) == reach


def test_one_scale_needs_no_draw():
    strategy = scaled(scales=(2.0,))
    assert {strategy.scale(seed, 3) for seed in range(9)} == {2.0}


def test_no_scale_that_fits_is_refused():
    with pytest.raises(ValueError, match="--target-length"):
        ScalePerSample(64, 64, original_length=32, scales=())
