# SPDX-License-Identifier: Apache-2.0
"""Frequencies and attention factors against closed forms; what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_cream.errors import UserError
from megatron_cream.rope import SCALINGS, compose, make_scaling

UNTRAINED = [name for name, cls in SCALINGS.items() if not cls.trained_by]
GRID = [(64, 1e4, 2.0), (128, 1e4, 8.0), (128, 5e5, 2.5), (96, 1e6, 64.0)]
LLAMA2 = {"dim": 128, "base": 1e4, "factor": 8.0, "original_length": 4096}


def plain(dim, base):
    return base ** -(np.arange(0, dim, 2) / dim)


def longrope_lists(dim):
    steps = np.arange(dim // 2)
    return {"short_factor": list(1 + steps / 64), "long_factor": list(1.5 + steps)}


def options_of(name, dim):
    return longrope_lists(dim) if name == "longrope" else {}


@pytest.mark.parametrize(("dim", "base", "factor"), GRID)
def test_uniform_closed_forms(dim, base, factor):
    options = {"dim": dim, "base": base, "factor": factor, "original_length": 4096}
    expected = plain(dim, base)
    for name in ("none", "rope-theta"):
        np.testing.assert_allclose(make_scaling(name, **options).inv_freq, expected, rtol=1e-14)
    linear = make_scaling("linear", **options).inv_freq
    np.testing.assert_allclose(linear, expected / factor, rtol=1e-14)
    ntk = make_scaling("ntk", **options).inv_freq
    stretch = factor ** -(np.arange(0, dim, 2) / (dim - 2))
    np.testing.assert_allclose(ntk, expected * stretch, rtol=1e-12)
    assert ntk[0] == 1.0
    assert ntk[-1] == pytest.approx(expected[-1] / factor, rel=1e-12)


def test_ntk_base_of_llama_at_8x():
    assert make_scaling("ntk", **LLAMA2).theta == pytest.approx(82684.62, abs=0.01)


@pytest.mark.parametrize(("length", "stretch"), [(1, 1), (4096, 1), (8192, 9), (32768, 57)])
def test_dynamic_divides_the_slowest_pair_by_the_length_it_sees(length, stretch):
    scaling = make_scaling("dynamic", **LLAMA2).at_length(length)
    np.testing.assert_allclose(plain(128, 1e4)[-1] / scaling.inv_freq[-1], stretch, rtol=1e-12)
    assert scaling.inv_freq[0] == 1.0


# Ends of the ramp for Llama-2, GPT-style 2048 and Llama-3, and the pairs strictly inside.
@pytest.mark.parametrize(
    ("base", "original", "factor", "low", "high", "differ"),
    [(1e4, 4096, 8.0, 20, 46, 25), (1e4, 2048, 8.0, 16, 41, 24), (5e5, 8192, 16.0, 18, 35, 16)],
)
def test_the_two_yarns_differ_on_the_ramp_alone(base, original, factor, low, high, differ):
    options = {"dim": 128, "base": base, "factor": factor, "original_length": original}
    paper, pose = (make_scaling(name, **options) for name in ("yarn", "yarn-pose"))
    ramp = np.clip((np.arange(64) - low) / (high - low), 0, 1)
    f = plain(128, base)
    np.testing.assert_allclose(paper.inv_freq, f * (ramp / factor + 1 - ramp), rtol=1e-6)
    np.testing.assert_allclose(pose.inv_freq, f / (ramp * factor + 1 - ramp), rtol=1e-6)
    unequal = np.flatnonzero(~np.isclose(paper.inv_freq, pose.inv_freq, rtol=1e-9))
    assert list(unequal) == list(range(low + 1, high))
    assert len(unequal) == differ
    for scaling in (paper, pose):
        assert scaling.attention_factor == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-14)


def test_the_two_yarns_differ_by_up_to_two_and_a_half_for_llama_2():
    paper, pose = (make_scaling(name, **LLAMA2) for name in ("yarn", "yarn-pose"))
    ratio = paper.inv_freq / pose.inv_freq
    assert ratio.argmax() == 33
    assert paper.divisors[33] == pytest.approx(1.78, abs=0.01)
    assert pose.divisors[33] == pytest.approx(4.50, abs=0.01)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    scaling = make_scaling("llama3", dim=128, base=5e5, factor=8.0, original_length=8192)
    waves = 2 * math.pi / plain(128, 5e5)
    divisors = scaling.divisors
    np.testing.assert_array_equal(divisors[waves < 8192 / 4], 1.0)
    np.testing.assert_allclose(divisors[waves > 8192], 8.0, rtol=1e-14)
    between = divisors[(waves >= 8192 / 4) & (waves <= 8192)]
    assert len(between) > 2
    assert ((between > 1) & (between < 8) & (np.diff(between, prepend=1) > 0)).all()


def test_longrope_takes_its_lists_by_length():
    lists = longrope_lists(128)
    scaling = make_scaling("longrope", **LLAMA2, **lists)
    np.testing.assert_array_equal(scaling.divisors, lists["long_factor"])
    np.testing.assert_array_equal(scaling.at_length(4096).divisors, lists["short_factor"])
    np.testing.assert_array_equal(scaling.at_length(4097).divisors, lists["long_factor"])
    unextended = make_scaling("longrope", **LLAMA2 | {"factor": 1.0}, **lists)
    np.testing.assert_array_equal(unextended.divisors, lists["short_factor"])
    assert scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(4096)))
    assert unextended.attention_factor == 1.0


def test_proportional_leaves_the_slowest_pairs_still():
    scaling = make_scaling("proportional", **LLAMA2, partial_rotary_factor=0.25)
    np.testing.assert_allclose(scaling.inv_freq[:16], plain(128, 1e4)[:16] / 8, rtol=1e-14)
    np.testing.assert_array_equal(scaling.inv_freq[16:], 0.0)
    assert scaling.wavelengths[1] == pytest.approx(2 * math.pi / scaling.inv_freq[15])


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_stretch_is_what_divides_the_frequencies_of_the_base(name):
    scaling = make_scaling(name, **LLAMA2, **options_of(name, 128)).at_length(20000)
    np.testing.assert_allclose(plain(128, 1e4) / scaling.stretch, scaling.inv_freq, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(set(UNTRAINED) - {"dynamic", "longrope"}))
def test_other_angles_do_not_depend_on_the_length(name):
    scaling = make_scaling(name, **LLAMA2)
    assert not scaling.varies_with_length
    for length in (1, 100_000):
        np.testing.assert_array_equal(scaling.at_length(length).inv_freq, scaling.inv_freq)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.7182818, 63.9])
@pytest.mark.parametrize(
    "name", sorted(set(UNTRAINED) - {"none", "rope-theta", "longrope", "cope", "drope"})
)
def test_real_factors_slow_no_pair_by_more_than_they_say(name, factor):
    scaling = make_scaling(name, **LLAMA2 | {"factor": factor})
    assert (scaling.stretch >= 1 - 1e-12).all()
    assert (scaling.stretch <= factor * (1 + 1e-12)).all()
    if factor == 1.0:
        np.testing.assert_allclose(scaling.inv_freq, plain(128, 1e4), rtol=1e-14)
        assert scaling.attention_factor == 1.0


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_settings_make_it_again(name):
    scaling = make_scaling(name, **LLAMA2, **options_of(name, 128))
    assert make_scaling(dim=128, **scaling.settings()) == scaling


def test_yarn_options():
    wide = make_scaling("yarn", **LLAMA2, beta_fast=64, beta_slow=0.5)
    assert np.count_nonzero((wide.kept > 0) & (wide.kept < 1)) > 25
    sharp = make_scaling("yarn", **LLAMA2, truncate=False)
    assert not np.isclose(sharp.inv_freq, make_scaling("yarn", **LLAMA2).inv_freq).all()
    assert make_scaling("yarn", **LLAMA2, attention_factor=1.5).attention_factor == 1.5
    assert make_scaling("yarn", **LLAMA2, mscale=1, mscale_all_dim=1).attention_factor == 1.0
    quotient = make_scaling("yarn", **LLAMA2, mscale=1, mscale_all_dim=0.5).attention_factor
    assert quotient == pytest.approx((1 + 0.1 * math.log(8)) / (1 + 0.05 * math.log(8)))


class TestComposed:
    llama31 = make_scaling("llama3", dim=128, base=5e5, factor=8.0, original_length=8192)

    def on_top(self, name, **changes):
        options = {"dim": 128, "base": 5e5, "factor": 8.0, "original_length": 131072}
        return make_scaling(name, **(options | changes))

    def test_linear_divides_every_angle(self):
        both = compose(self.llama31, self.on_top("linear"))
        np.testing.assert_allclose(both.inv_freq, self.llama31.inv_freq / 8, rtol=1e-14)

    def test_ntk_stretches_as_on_a_plain_model(self):
        both = compose(self.llama31, self.on_top("ntk"))
        ratio = self.llama31.inv_freq / both.inv_freq
        np.testing.assert_allclose(ratio, self.on_top("ntk").stretch, rtol=1e-12)

    def test_attention_factor_of_the_base_stays(self):
        base = make_scaling("yarn", dim=128, base=5e5, factor=4.0, original_length=32768)
        assert compose(base, self.on_top("linear")).attention_factor == base.attention_factor > 1

    @pytest.mark.parametrize("name", ["yarn", "yarn-pose", "llama3", "none", "rope-theta"])
    def test_methods_that_describe_all_angles_are_refused(self, name):
        with pytest.raises(ValueError, match="it must be 'linear' or 'ntk'"):
            compose(self.llama31, self.on_top(name))

    def test_another_theta_is_refused(self):
        with pytest.raises(ValueError, match="1e\\+06.*500000"):
            compose(self.llama31, self.on_top("linear", base=1e6))

    def test_a_base_that_varies_with_the_length_is_refused(self):
        with pytest.raises(ValueError, match="'dynamic'"):
            compose(self.on_top("dynamic"), self.on_top("linear"))


def test_wavelengths():
    scaling = make_scaling("linear", dim=4, base=100.0, factor=2.0, original_length=8)
    assert scaling.wavelengths == pytest.approx((4 * math.pi, 40 * math.pi))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cubic", {}, "--rope-interpolation"),
        ("linear", {"factor": 0.5}, "--rope-factor"),
        ("linear", {"factor": math.nan}, "--rope-factor"),
        ("linear", {"factor": 10**400}, r"--rope-factor. is 1000+... .401 characters.: it must be"),
        ("none", {"base": 10**400}, "--rope-theta"),
        ("yarn", {"beta_fast": 10**400}, "beta_fast .*401 characters.: it must be a positive"),
        ("longrope", {"short_factor": [10**400] * 32}, "32 positive numbers"),
        ("none", {"base": 0.0}, "--rotary-base"),
        ("none", {"dim": 7}, "dim is 7"),
        ("ntk", {"dim": 2}, "dim is 2"),
        ("dynamic", {"dim": 2}, "dim is 2"),
        ("none", {"original_length": 0}, "--original-length"),
        ("linear", {"beta_fast": 32}, "beta_fast: linear takes no options"),
        ("yarn", {"betafast": 32}, "betafast: yarn takes beta_fast, beta_slow"),
        ("yarn", {"beta_fast": 1, "beta_slow": 2}, "beta_fast .* is 1: .* more than beta_slow, 2"),
        ("yarn", {"beta_fast": -1}, "beta_fast .* is -1: it must be a positive number"),
        ("yarn", {"truncate": 1}, "truncate .* is 1: it must be true or false"),
        ("yarn", {"attention_factor": "1"}, "attention_factor .* positive number"),
        ("yarn", {"base": 1.0}, "--rope-theta.* is 1.0: yarn needs more than 1"),
        ("yarn-pose", {"mscale": 1.0}, "mscale: yarn-pose takes"),
        ("llama3", {"low_freq_factor": 4}, "high_freq_factor .* is 4.0: .* low_freq_factor, 4"),
        ("longrope", {}, "short_factor is missing.* 32 positive.*--rope-factors-file"),
        ("longrope", longrope_lists(128), "short_factor .* is a list of 64: it must be 32"),
        ("longrope", {"short_factor": [0.0] * 32}, "positive numbers"),
        ("proportional", {"partial_rotary_factor": 0.01}, "partial_rotary_factor .* 0.01"),
    ],
)
def test_refuses(name, changes, message):
    options = {"dim": 64, "base": 1e4, "factor": 8.0, "original_length": 4096}
    with pytest.raises(ValueError, match=message):
        make_scaling(name, **(options | changes))


def test_is_not_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_scaling("linear", **LLAMA2).factor = 0.5


def test_cope_fades_out_the_pairs_that_never_turned_once():
    settings = {"dim": 128, "base": 500000.0, "factor": 8.0, "original_length": 8192}
    plain, cope = make_scaling("none", **settings), make_scaling("cope", **settings)
    slow = 2 * np.pi / plain.inv_freq > 8192
    assert cope.clipped == slow.sum() == 29
    assert (cope.inv_freq[~slow] == plain.inv_freq[~slow]).all()
    # 2602.05258: half a cosine from 1 to 0
    j = np.arange(29)
    mask = 0.5 * (1 + np.cos(np.pi * j / 28))
    np.testing.assert_allclose(cope.inv_freq[slow], plain.inv_freq[slow] * mask, atol=1e-30)
    given = make_scaling("cope", **settings, clipped_pairs=20)
    assert (given.inv_freq == plain.inv_freq)[:45].all()  # the first of the 20 is kept
    assert (given.inv_freq < plain.inv_freq)[45:].all()
    assert given.attention_factor == 1


def test_drope_turns_nothing():
    drope = make_scaling("drope", **LLAMA2 | {"factor": 8.0})
    assert (drope.inv_freq * 2**21 < 1e-20).all()
    assert drope.wavelengths == (math.inf, math.inf)


@pytest.mark.parametrize("count", [1, 2.5, 65])
def test_cope_clips_a_whole_number_of_its_pairs(count):
    with pytest.raises(UserError, match=f"clipped_pairs.*{count}.*2 to 64"):
        make_scaling("cope", **LLAMA2 | {"factor": 8.0}, clipped_pairs=count)
