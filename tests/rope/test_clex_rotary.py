# SPDX-License-Identifier: Apache-2.0
"""The module in a model: scales, casts, checkpoints without weights, what servers are given."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_cream.config import ExtensionConfig
from megatron_cream.positions.mixtures import ScalePerSample
from megatron_cream.rope import hf_rope_fields, make_scaling, scaling_from_hf

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N0, D = 96, 16


def clex(factor=8.0, **options):
    return make_scaling("clex", dim=D, factor=factor, original_length=N0, **options)


def rotary(factor=8.0, std=0.1, **options):
    from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding

    module = ClexRotaryEmbedding(clex(factor, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        down = module.table.field.split(module.weights)[1]
        down.normal_(std=std, generator=generator)
    return module


def by_length(module, length):
    module.set_position_ids(torch.arange(length)[None])
    return module(length)


def step_gradient(module, scales):
    """The gradient of sum of sines of all angles at plain positions."""
    module.set_position_ids(torch.arange(N0).expand(len(scales), -1))
    module.set_scales(torch.tensor(scales))
    carrier = module(N0)
    (carrier[:, : D // 2, None] * carrier[:, None, D // 2 :]).sin().sum().backward()
    total = module.table.gradient()
    return module.table.pull_back(total)


@pytest.mark.parametrize("length", [50, 96, 97, 400, 768, 2000])
def test_evaluation_turns_as_the_frozen_export(length):
    """Bit for bit, at any length; beyond T at the scale that the length asks for."""
    from megatron_cream.extras.clex import freeze
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding

    module = rotary()
    scale = max(1, -(-length // N0))
    frozen = freeze(module.scaling, module.weights.detach(), float(scale)).at_length(10**6)
    expected = by_length(PositionRotaryEmbedding(frozen), length)
    assert torch.equal(by_length(module, length), expected)


def test_scale_of_one_is_the_base_model():
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding

    base = PositionRotaryEmbedding(make_scaling("none", dim=D, original_length=N0))
    assert torch.equal(by_length(rotary(), 96), by_length(base, 96))
    module = rotary()
    assert step_gradient(module, [1.0, 1.0]).count_nonzero() == 0


def test_samples_turn_at_their_own_scales():
    module = rotary(7.5)
    module.set_position_ids(torch.arange(N0).expand(3, -1))
    module.set_scales(torch.tensor([7.5, 1.0, 7.0]))
    found = module(N0)[:, : D // 2]
    module.table.forget()
    for row, scale in zip(found, (7.5, 1.0, 7.0), strict=True):
        assert torch.equal(row, module.table.at(module.weights, scale))
    assert not torch.equal(found[0], found[2])


def test_gradient_against_finite_differences():
    """Through the rounded float32 table and the ODE; angles stay small enough to difference."""
    module, scales = rotary(), [8.0, 3.0, 1.0]
    gradient = step_gradient(module, scales)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(module.weights.shape, generator=generator)

    def value(move):
        from megatron_cream.extras.clex import solve_weights

        field = module.table.field
        weights = module.weights.detach().double() + move * direction
        base = 10000.0 ** -(torch.arange(0, D, 2).double() / D)
        stretch = solve_weights(field, weights, clex().scales).log_stretch
        inv_freq = base * torch.exp(-torch.from_numpy(stretch))
        rows = inv_freq[[7, 2, 0]]
        return (rows[:, :, None] * torch.arange(N0).double()).sin().sum()

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(gradient @ direction.double()) == pytest.approx(float(slope), rel=1e-3)
    assert abs(slope) > 1


def test_weights_far_too_large_stay_finite_and_lead_back():
    module = rotary(std=50.0)
    gradient = step_gradient(module, [8.0, 2.0])
    served = module.table.inv_freq.detach()
    assert torch.isfinite(served).all() and served.max() <= np.float32(np.pi) * (1 + 1e-6)
    assert served.max() > 3, "nothing is at the limit"
    assert torch.isfinite(gradient).all()


def test_weights_that_are_no_numbers_are_an_error():
    module = rotary()
    with torch.no_grad():
        module.weights[-1] = float("nan")
    with pytest.raises(RuntimeError, match="not finite.*--lr"):
        by_length(module, 200)


def test_frequencies_of_a_bfloat16_model_are_float32():
    """And those of its rounded weights, as a checkpoint of it has them."""
    module, rounded = rotary(), rotary()
    before = by_length(module, 400)
    module.bfloat16()
    with torch.no_grad():
        rounded.weights.copy_(module.weights)
    after = by_length(module, 400)
    assert after.dtype == torch.float32
    assert torch.equal(after, by_length(rounded, 400))
    assert not torch.equal(after, before)
    assert len(module.weights.shape) == 1, "Megatron decays the weights of a matrix"


def test_base_checkpoint_without_weights():
    module = rotary()
    before = module.weights.detach().clone()
    with pytest.raises(RuntimeError, match="Missing key.*weights"):
        module.load_state_dict({})
    module.fresh = True
    assert module.sharded_state_dict() == {}
    module.load_state_dict({})
    assert not module.fresh
    assert torch.equal(module.weights, before)


def test_loaded_weights_take_effect():
    module, other = rotary(std=0.0), rotary()
    before = by_length(module, 400)
    module.load_state_dict(other.state_dict())
    assert torch.equal(by_length(module, 400), by_length(other, 400))
    assert not torch.equal(by_length(module, 400), before)


def test_export_is_what_transformers_computes():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megatron_cream.extras.clex import freeze

    module = rotary()
    frozen = freeze(module.scaling, module.weights.detach(), 8.0)
    fields = hf_rope_fields(frozen, 768)
    config = LlamaConfig(hidden_size=4 * D, num_attention_heads=4, **fields)
    inv_freq, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=768)
    assert torch.equal(inv_freq, module.table.at(module.weights, 8.0))
    assert attention == 1.0
    short, _ = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=96)
    assert torch.equal(short, module.table.at(module.weights, 1.0))
    back = scaling_from_hf(config.to_dict())
    np.testing.assert_array_equal(back.at_length(768).inv_freq, frozen.at_length(768).inv_freq)


def settings(**changes):
    values = {"train_length": N0, "target_length": 8 * N0, "original_length": N0}
    values |= {"position_strategy": "randpos", "rope_interpolation": "clex", "rope_factor": 8.0}
    return ExtensionConfig(**(values | changes))


def test_scales_and_positions_are_functions_of_the_index():
    strategy = settings().strategy()
    drawn = [strategy.scale(1, i) for i in range(4000)]
    assert drawn[:50] == [settings().strategy().scale(1, i) for i in range(50)]
    counts = np.unique(drawn, return_counts=True)
    assert counts[0].tolist() == list(range(1, 9))
    assert (np.abs(counts[1] - 500) < 5 * np.sqrt(500)).all()
    for i in range(50):
        ids = strategy.layout(1, i).position_ids
        assert len(ids) == N0 and (np.diff(ids) > 0).all()
        assert ids[-1] < drawn[i] * N0
        if drawn[i] == 1:
            assert ids.tolist() == list(range(N0))


def test_scales_that_hold_a_sample():
    longer = dataclasses.replace(settings(), train_length=240)
    assert longer.strategy().scales == (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert isinstance(longer.plain_strategy(), ScalePerSample)
    assert longer.plain_strategy().scale(0, 0) == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_factor": 4.0}, "--rope-factor.* is 4: .*clex.* = 8, it must be that"),
        ({"target_length": N0, "rope_factor": 1.0}, "it must be that, and more than 1"),
        ({"sample_unit": "packed-documents"}, "--sample-unit.*'document', 'window', 'packed'"),
        ({"rope_options": {"act": "relu"}}, "act .*'relu': it must be one of .*'tanh', 'silu'"),
        ({"rope_options": {"param_factor": 1.5}}, "param_factor.* 1.5: it must be a whole number"),
        ({"rope_options": {"time_step": 0}}, "time_step.* is 0: it must be a positive number"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_untrained_settings_are_not_written_down():
    with pytest.raises(ValueError, match="freeze"):
        hf_rope_fields(clex(), 768)
