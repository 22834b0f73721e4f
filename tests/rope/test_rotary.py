# SPDX-License-Identifier: Apache-2.0
"""Angles against Megatron's own rotary (bit for bit) and transformers'."""

import pytest
import torch

from megatron_cream.rope import make_scaling

pytestmark = pytest.mark.usefixtures("cpu_megatron")


def rotary(name="none", dim=64, base=1e4, factor=1.0, **options):
    from megatron_cream.rope import PositionRotaryEmbedding

    scaling = make_scaling(name, dim=dim, base=base, factor=factor, original_length=4096)
    return PositionRotaryEmbedding(scaling, **options)


def megatron_rotary(dim=64, base=1e4, **options):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding(dim, 1.0, rotary_base=base, use_cpu_initialization=True, **options)


def random_ids(batch, length, target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(target, generator=generator)[:length].sort().values for _ in range(batch)]
    return torch.stack(ids)


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_plain_positions_are_bit_equal_to_megatron(dim, base):
    theirs = megatron_rotary(dim, base)(5000)
    ours = rotary(dim=dim, base=base)
    assert torch.equal(ours.plain_angles(5000), theirs)
    ours.set_position_ids(torch.arange(5000)[None])
    assert torch.equal(ours(5000), theirs)


@pytest.mark.parametrize("factor", [2, 8, 64])
def test_linear_is_bit_equal_to_megatron(factor):
    theirs = megatron_rotary(seq_len_interpolation_factor=factor)(5000)
    assert torch.equal(rotary("linear", factor=factor).plain_angles(5000), theirs)


def test_interleaved_is_each_angle_twice_in_a_row():
    ids = random_ids(2, 16, 4096)
    halves = rotary().angles(ids)
    pairs = rotary(rotary_interleaved=True).angles(ids)
    assert torch.equal(pairs[..., 0::2], halves[..., :32])
    assert torch.equal(pairs[..., 1::2], halves[..., :32])


@pytest.mark.parametrize("target", [4096, 262144])
@pytest.mark.parametrize("name", ["none", "linear", "ntk"])
def test_arbitrary_ids_equal_transformers(name, target):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = rotary(name, dim=128, factor=target / 4096)
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=target,
        rope_parameters=ours.scaling.to_hf(),
    )
    ids = random_ids(3, 256, target)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), ids)
    angles = ours.angles(ids)
    assert angles.shape == (256, 3, 1, 128)
    assert angles.dtype == torch.float32
    torch.testing.assert_close(angles.cos()[:, :, 0].transpose(0, 1), cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(angles.sin()[:, :, 0].transpose(0, 1), sin, atol=1e-6, rtol=0)


def test_far_positions_keep_their_precision_in_a_half_precision_model():
    from megatron.core.transformer.module import Float16Module  # noqa: F401  (what must not cast)

    ours = rotary().bfloat16()
    exact = 262143 * ours.scaling.inv_freq
    found = ours.angles(torch.tensor([[262143]])).double()[0, 0, 0, :32].numpy()
    assert abs(found - exact).max() < 0.02


def test_position_ids_serve_one_step_only():
    ours = rotary()
    ours.set_position_ids(torch.arange(8)[None])
    ours(8)
    with pytest.raises(RuntimeError, match="no position ids"):
        ours(8)


def test_wrong_number_of_position_ids():
    ours = rotary()
    ours.set_position_ids(torch.arange(8)[None])
    with pytest.raises(ValueError, match="16 tokens"):
        ours(16)


def test_install_refuses_a_model_without_rope():
    from megatron_cream.rope import install_rotary

    with pytest.raises(ValueError, match="--position-embedding-type rope"):
        install_rotary(torch.nn.Linear(1, 1), rotary().scaling)
