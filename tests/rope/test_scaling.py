# SPDX-License-Identifier: Apache-2.0
"""Frequencies against closed forms and transformers."""

import math

import numpy as np
import pytest

from megatron_cream.rope import make_scaling, scaling_from_hf

GRID = [(64, 1e4, 2.0), (128, 1e4, 8.0), (128, 5e5, 2.5), (96, 1e6, 64.0)]


@pytest.mark.parametrize(("dim", "base", "factor"), GRID)
def test_closed_forms(dim, base, factor):
    plain = base ** -(np.arange(0, dim, 2) / dim)
    options = {"dim": dim, "base": base, "factor": factor, "original_length": 4096}
    np.testing.assert_allclose(make_scaling("none", **options).inv_freq, plain, rtol=1e-14)
    np.testing.assert_allclose(
        make_scaling("linear", **options).inv_freq, plain / factor, rtol=1e-14
    )
    ntk = make_scaling("ntk", **options).inv_freq
    stretch = factor ** -(np.arange(0, dim, 2) / (dim - 2))
    np.testing.assert_allclose(ntk, plain * stretch, rtol=1e-12)
    assert ntk[0] == 1.0
    assert ntk[-1] == pytest.approx(plain[-1] / factor, rel=1e-12)


def test_ntk_base_of_llama_at_8x():
    scaling = make_scaling("ntk", dim=128, base=1e4, factor=8.0, original_length=4096)
    assert scaling.theta == pytest.approx(82684.62, abs=0.01)


@pytest.mark.parametrize(("dim", "base", "factor"), GRID)
@pytest.mark.parametrize("name", ["none", "linear", "ntk"])
def test_transformers_computes_the_same_from_our_config(name, dim, base, factor):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = make_scaling(name, dim=dim, base=base, factor=factor, original_length=4096)
    config = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=round(4096 * factor),
        rope_parameters=scaling.to_hf(),
    )
    kind = scaling.to_hf()["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq = LlamaRotaryEmbedding(config).inv_freq
    else:
        inv_freq, _ = modeling.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    np.testing.assert_allclose(inv_freq.numpy(), scaling.inv_freq, rtol=1e-6)


@pytest.mark.parametrize("name", ["none", "linear", "ntk"])
def test_reads_back_the_angles_it_wrote(name):
    scaling = make_scaling(name, dim=64, base=1e4, factor=8.0, original_length=4096)
    config = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 32768,
        "rope_parameters": scaling.to_hf(),
    }
    np.testing.assert_allclose(scaling_from_hf(config).inv_freq, scaling.inv_freq, rtol=1e-14)


def test_reads_version_4_configs():
    config = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    }
    scaling = scaling_from_hf(config)
    assert (scaling.name, scaling.base, scaling.factor) == ("linear", 5e5, 8.0)
    assert scaling.original_length == 4096


def test_wavelengths():
    scaling = make_scaling("linear", dim=4, base=100.0, factor=2.0, original_length=8)
    assert scaling.wavelengths == pytest.approx((4 * math.pi, 40 * math.pi))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cubic", {}, "--rope-interpolation"),
        ("linear", {"factor": 0.5}, "--rope-factor"),
        ("linear", {"factor": math.nan}, "--rope-factor"),
        ("none", {"base": 0.0}, "--rotary-base"),
        ("none", {"dim": 7}, "dim is 7"),
        ("ntk", {"dim": 2}, "dim is 2"),
        ("none", {"original_length": 0}, "--original-length"),
    ],
)
def test_refuses(name, changes, message):
    options = {"dim": 64, "base": 1e4, "factor": 8.0, "original_length": 4096}
    with pytest.raises(ValueError, match=message):
        make_scaling(name, **(options | changes))


def test_unknown_rope_type_in_a_config_is_named():
    config = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "clex"},
    }
    with pytest.raises(ValueError, match="'clex'"):
        scaling_from_hf(config)
