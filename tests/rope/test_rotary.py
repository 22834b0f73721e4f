# SPDX-License-Identifier: Apache-2.0
"""Angles against Megatron's own rotary (bit for bit) and transformers'."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cream.rope import SCALINGS, hf_rope_fields, make_scaling

pytestmark = pytest.mark.usefixtures("cpu_megatron")


UNTRAINED = [name for name, cls in SCALINGS.items() if not cls.trained_by]


def rotary(name="none", dim=64, base=1e4, factor=1.0, *, original=4096, **options):
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding

    of_module = {k: options.pop(k) for k in ("rotary_interleaved",) if k in options}
    scaling = make_scaling(
        name, dim=dim, base=base, factor=factor, original_length=original, **options
    )
    return PositionRotaryEmbedding(scaling, **of_module)


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


def test_llama3_equals_megatrons_own():
    theirs = megatron_rotary(128, 5e5, rope_scaling=True, rope_scaling_factor=8.0).inv_freq
    ours = rotary("llama3", 128, 5e5, 8.0, original=8192).inv_freq
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("factor", [2.5, 8, 64])
def test_yarn_equals_megatrons_own(factor):
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
    )

    theirs, concentration = YarnRotaryEmbedding(
        128,
        rotary_base=1e4,
        scaling_factor=factor,
        original_max_position_embeddings=4096,
        mscale=1.0,
        mscale_all_dim=0.0,
        use_cpu_initialization=True,
    )(5000)
    ours = rotary("yarn", 128, factor=factor)
    torch.testing.assert_close(ours.plain_angles(5000), theirs, rtol=1e-6, atol=1e-6)
    assert ours.scaling.attention_factor == pytest.approx(concentration)


def test_lengths_choose_angles_only_where_they_are_served_so():
    ours = rotary("dynamic", factor=4.0)
    plain = ours.inv_freq
    ours.set_length(16384)
    assert ours.inv_freq[-1] < plain[-1] / 12
    ours.set_length(100)
    assert torch.equal(ours.inv_freq, plain)
    fixed = rotary("yarn", factor=4.0)
    before = fixed.inv_freq
    fixed.set_length(100)
    assert fixed.inv_freq is before


class TestAttentionFactorOnRotatedDimensions:
    """What ``rotate`` does with a factor; the fused kernel is stood in for by the unfused."""

    @pytest.fixture
    def attention(self, monkeypatch):
        """Megatron's attention module, with a kernel that knows no factor and counts its calls."""
        from megatron.core.models.common.embeddings import rope_utils
        from megatron.core.transformer import attention

        from megatron_cream.mcore.rotary import patch_apply_rotary_pos_emb

        def kernel(t, freqs, interleaved=False):
            attention.kernel_calls += 1
            return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)

        monkeypatch.setattr(attention, "kernel_calls", 0, raising=False)
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", kernel)
        patch_apply_rotary_pos_emb.apply()
        return attention

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("dim", [16, 64])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_fused_and_unfused_agree(self, attention, batch, dim, interleaved):
        angles = rotary(dim=dim, rotary_interleaved=interleaved).angles(random_ids(batch, 8, 4096))
        t = torch.randn(8, batch, 2, 64, generator=torch.manual_seed(0))
        results = []
        for fused in (True, False):
            config = SimpleNamespace(
                apply_rope_fusion=fused,
                rotary_interleaved=interleaved,
                mrope_section=None,
                multi_latent_attention=False,
            )
            options = {"config": config, "cu_seqlens": None, "mscale": 1.25, "cp_group": "none"}
            results.append(attention.apply_rotary_pos_emb(t, angles, **options))
        assert attention.kernel_calls == 1, "a factor must not leave the fused kernel"
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(results[0][..., dim:], t[..., dim:], atol=0, rtol=0)
        norms = [x[..., :dim].norm() for x in (results[0], t)]
        assert norms[0] / norms[1] == pytest.approx(1.25, rel=1e-5)


def test_interleaved_is_each_angle_twice_in_a_row():
    ids = random_ids(2, 16, 4096)
    halves = rotary().angles(ids)
    pairs = rotary(rotary_interleaved=True).angles(ids)
    assert torch.equal(pairs[..., 0::2], halves[..., :32])
    assert torch.equal(pairs[..., 1::2], halves[..., :32])


def settings(name):
    """Options of a method that must have some."""
    pairs = range(64)
    return {
        "longrope": {"short_factor": [1.0] * 64, "long_factor": [1.0 + i / 3 for i in pairs]},
        "proportional": {"partial_rotary_factor": 0.5},
    }.get(name, {})


@pytest.mark.parametrize("target", [4096, 30000, 262144])
@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_arbitrary_ids_equal_transformers(name, target):
    """To 1e-6 at position 262143 too: the frequencies are the same to the last bit."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = rotary(name, dim=128, factor=target / 4096, **settings(name))
    fields = hf_rope_fields(ours.scaling, target)
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, **fields)
    ids = random_ids(3, 256, target)
    ids[:, -1] = target - 1
    ours.set_length(target)
    theirs = LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), ids)
    cos, sin = cos / theirs.attention_scaling, sin / theirs.attention_scaling
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
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
    from megatron_cream.mcore.rotary import install_rotary

    with pytest.raises(ValueError, match="--position-embedding-type rope"):
        install_rotary(torch.nn.Linear(1, 1), rotary().scaling)


@pytest.mark.parametrize("offset", [1, 5, 4000])
def test_plain_angles_from_an_offset_are_megatrons(offset):
    ours, theirs = rotary(), megatron_rotary()
    assert torch.equal(ours.plain_angles(8, offset), theirs(8, offset=offset))
    ours.set_position_ids(None, plain=True)
    assert torch.equal(ours(8, offset), ours.plain_angles(8 + offset)[offset:])


def group_of_two(rank):
    return SimpleNamespace(size=lambda: 2, rank=lambda: rank)


def test_packed_angles_are_those_of_the_tokens_side_by_side():
    ours, ids = rotary(), random_ids(1, 16, 4096)
    ours.set_position_ids(ids)
    # Cut for this rank already: the number of tokens is not that of the sample.
    found = ours(32, packed_seq=True, cp_group=group_of_two(0))
    assert found.shape == (1, 16, 1, 64)
    assert torch.equal(found[0], ours.angles(ids)[:, 0])


def test_a_context_parallel_rank_has_its_part_of_the_position_ids():
    ours, ids = rotary(), random_ids(2, 8, 4096)
    ours.set_position_ids(ids)
    assert torch.equal(ours(16, cp_group=group_of_two(1)), ours.angles(ids))
    ours.set_position_ids(ids)
    with pytest.raises(ValueError, match="on each of 2 context-parallel ranks"):
        ours(8, cp_group=group_of_two(1))


@pytest.mark.parametrize(("rank", "parts"), [(0, (0, 3)), (1, (1, 2))])
def test_plain_angles_are_dealt_out_in_zigzag(rank, parts):
    ours = rotary()
    whole = ours.plain_angles(16)
    found = ours.plain_angles(16, cp_group=group_of_two(rank))
    assert torch.equal(found, torch.cat([whole[4 * part : 4 * part + 4] for part in parts]))
