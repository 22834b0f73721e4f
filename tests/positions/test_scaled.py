# SPDX-License-Identifier: Apache-2.0
"""A scale a sample: which one, how far its positions reach, and apart from every other draw."""

import numpy as np
import pytest

from megatron_cream.positions import make_strategy, philox
from megatron_cream.positions.scaled import Scaled

SCALES = (1.0, 2.0, 4.0, 8.0)


def scaled(train=16, original=32, scales=SCALES, inner="randpos", **options):
    target = round(max(scales) * original)
    return Scaled(
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
        Scaled(64, 64, original_length=32, scales=())
