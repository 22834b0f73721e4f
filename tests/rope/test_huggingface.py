# SPDX-License-Identifier: Apache-2.0
"""config.json against transformers itself: what it computes, what it reads, what we read back."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch

from megatron_cream.config import ExtensionConfig, rope_settings
from megatron_cream.rope import SCALINGS, compose, hf_rope_fields, make_scaling, scaling_from_hf
from megatron_cream.rope.huggingface import with_rope

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

UNTRAINED = [name for name, cls in SCALINGS.items() if not cls.trained_by]
DIMS, BASES, FACTORS, LENGTHS = (64, 128), (1e4, 5e5, 1e6), (1.0, 2.5, 8.0, 64.0), (2048, 8192)
GRID = list(itertools.product(DIMS, BASES, FACTORS, LENGTHS))
OPTIONS = {
    "yarn": [
        {},
        {"beta_fast": 24.0, "beta_slow": 2.0},
        {"truncate": False},
        {"attention_factor": 1.25},
        {"mscale": 0.707, "mscale_all_dim": 0.5},
    ],
    "yarn-pose": [{}, {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25}],
    "llama3": [{}, {"low_freq_factor": 0.5, "high_freq_factor": 8.0}],
    "proportional": [{}, {"partial_rotary_factor": 0.25}],
    "cope": [{}, {"clipped_pairs": 5}],
}


def lists(dim):
    steps = np.arange(dim // 2)
    return {"short_factor": list(1 + steps / 64), "long_factor": list(1.5 + steps)}


def variants(name, dim):
    if name == "longrope":
        return [lists(dim), lists(dim) | {"attention_factor": 1.19}]
    return OPTIONS.get(name, [{}])


def llama(fields, head_dim, **changes):
    size = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    fields = json.loads(json.dumps(fields))  # as it stands in a file, and not shared
    return transformers.LlamaConfig(**size, **fields, **changes)


def computed(config, length=None):
    """Frequencies and attention factor that transformers computes for sequences of ``length``."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        rotary = GlmRotaryEmbedding(config)  # as Llama's, and knows partial dimensions
        return rotary.inv_freq.numpy(), rotary.attention_scaling
    inv_freq, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    return inv_freq.numpy(), attention


@pytest.fixture(autouse=True)
def quiet():
    """transformers warns about factors that are not T / original; the grid has them on purpose."""
    logger = logging.getLogger("transformers")
    level, _ = logger.level, logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_transformers_computes_the_same(name):
    for (dim, base, factor, original), options in itertools.product(GRID, range(5)):
        if options >= len(variants(name, dim)):
            continue
        scaling = make_scaling(
            name,
            dim=dim,
            base=base,
            factor=factor,
            original_length=original,
            **variants(name, dim)[options],
        )
        target = max(round(original * factor), original + 1)
        config = llama(hf_rope_fields(scaling, target), dim)
        for length in (original // 2, original, original + 1, target):
            inv_freq, attention = computed(config, length)
            served = scaling.at_length(length)
            np.testing.assert_allclose(inv_freq, served.inv_freq, rtol=1e-6, atol=1e-12)
            assert attention == pytest.approx(served.attention_factor, rel=1e-6)


def test_every_type_that_transformers_has_is_compared():
    scalings = [make_scaling(name, dim=64, original_length=8, **some(name)) for name in UNTRAINED]
    assert {scaling.to_hf()["rope_type"] for scaling in scalings} == {
        *ROPE_INIT_FUNCTIONS,
        "default",
    }


def some(name):
    return variants(name, 64)[-1]


def example(name, dim=64, **changes):
    options = {"dim": dim, "base": 5e5, "factor": 8.0, "original_length": 4096, **changes}
    return make_scaling(name, **options, **variants(name, dim)[-1])


def examples():
    inner = make_scaling("llama3", dim=64, base=5e5, factor=4.0, original_length=1024)
    return [*map(example, UNTRAINED), compose(inner, example("linear"))]


@pytest.mark.parametrize("scaling", examples(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kept", ["both", "rope_parameters", "rope_scaling"])
def test_old_and_new_fields_say_the_same(scaling, kept, tmp_path):
    fields = hf_rope_fields(scaling, 32768)
    if kept != "both":
        del fields["rope_scaling" if kept == "rope_parameters" else "rope_parameters"]
    llama(fields, 64).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, **fields})
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    rotary = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(
        rotary.inv_freq.numpy(), scaling.at_length(1).inv_freq, rtol=1e-6, atol=1e-12
    )
    assert rotary.attention_scaling == pytest.approx(scaling.attention_factor, rel=1e-6)
    assert config.max_position_embeddings == (4096 if scaling.name == "dynamic" else 32768)


@pytest.mark.parametrize("scaling", examples(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("length", [100, 4096, 4097, 32768])
def test_cos_and_sin_of_a_sequence(scaling, length):
    """Through the module that a served model runs, which picks angles by the positions it sees."""
    rotary = LlamaRotaryEmbedding(llama(hf_rope_fields(scaling, 32768), 64))
    ids = torch.tensor([[0, 1, length // 2, length - 1]])
    cos, sin = rotary(torch.zeros(1), ids)
    served = scaling.at_length(length)
    inv_freq = torch.from_numpy(served.inv_freq)[None, None]
    angles = (ids[..., None].double() * inv_freq).repeat(1, 1, 2)
    # float32 angles near 32768 are known to 2e-3 radians.
    for found, expected in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(
            found.double(), expected * served.attention_factor, atol=6e-3, rtol=0
        )


@pytest.mark.parametrize("scaling", examples(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("version", [4, 5])
def test_reads_back_what_it_wrote(scaling, version):
    fields = hf_rope_fields(scaling, 32768)
    del fields["rope_scaling" if version == 5 else "rope_parameters"]
    config = json.loads(json.dumps(fields)) | {"hidden_size": 256, "num_attention_heads": 4}
    back = scaling_from_hf(config)
    assert back.dim == scaling.dim
    for length in (100, 4096, 32768):
        np.testing.assert_allclose(
            back.at_length(length).inv_freq, scaling.at_length(length).inv_freq, rtol=1e-14
        )
    assert back.attention_factor == pytest.approx(scaling.attention_factor, rel=1e-14)


def test_yarn_pose_is_exported_as_longrope():
    scaling = make_scaling("yarn-pose", dim=128, factor=8.0, original_length=4096)
    parameters = scaling.to_hf()
    assert parameters["rope_type"] == "longrope"
    assert parameters["short_factor"] == parameters["long_factor"]
    config = llama(hf_rope_fields(scaling, 32768), 128)
    for length in (4096, 32768):
        inv_freq, attention = computed(config, length)
        np.testing.assert_allclose(inv_freq, scaling.inv_freq, rtol=1e-6)
        assert attention == pytest.approx(scaling.attention_factor, rel=1e-6)


@pytest.mark.parametrize(("dim", "head_dim"), [(32, 64), (64, 192), (26, 80), (20, 80)])
@pytest.mark.parametrize("name", sorted(set(UNTRAINED) - {"proportional"}))
def test_partial_rotary_dimension(name, dim, head_dim):
    scaling = example(name, dim)
    fields = hf_rope_fields(scaling, 32768, head_dim=head_dim)
    inv_freq, _ = computed(llama(fields, head_dim), 32768)
    assert inv_freq.shape == (dim // 2,)
    np.testing.assert_allclose(inv_freq, scaling.at_length(32768).inv_freq, rtol=1e-6)
    assert scaling_from_hf(fields | {"head_dim": head_dim}).dim == dim


@pytest.mark.parametrize("head_dim", range(2, 258, 2))
def test_partial_dimensions_come_back_exactly(head_dim):
    """Readers round the product of head_dim and the share down."""
    for dim in range(2, head_dim, 2):
        scaling = make_scaling("none", dim=dim, original_length=64)
        fields = json.loads(json.dumps(hf_rope_fields(scaling, 64, head_dim=head_dim)))
        assert int(head_dim * fields["partial_rotary_factor"]) == dim
        assert int(head_dim * fields["rope_parameters"]["partial_rotary_factor"]) == dim


SCALED_BASE = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0},
    "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5},
    "vocab_size": 7,
}


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_nothing_is_left_of_the_rope_that_a_base_had(name):
    """Old readers look at rope_scaling, and at an original window at the top, before anything."""
    scaling = make_scaling(name, dim=64, base=1e6, factor=4.0, original_length=2048, **some(name))
    written = with_rope(SCALED_BASE, hf_rope_fields(scaling, 8192))
    parameters = written["rope_parameters"]
    assert parameters == scaling.to_hf()
    assert written["rope_theta"] == parameters["rope_theta"]
    assert "partial_rotary_factor" not in written
    older = written["rope_scaling"]
    if parameters["rope_type"] == "default":
        assert older is None
    else:
        same = {key: value for key, value in parameters.items() if key != "rope_theta"}
        assert older == same | {"type": parameters["rope_type"]}
    expected = 2048 if parameters["rope_type"] == "longrope" else None
    assert written.get("original_max_position_embeddings") == expected
    assert written["vocab_size"] == 7
    back = scaling_from_hf(written | {"head_dim": 64})
    np.testing.assert_allclose(back.at_length(8192).inv_freq, scaling.at_length(8192).inv_freq)


PUBLISHED = {
    "Llama-3.1-8B": (
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        ("llama3", 8.0, 8192),
    ),
    "Qwen2.5 with YaRN": (
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        },
        ("yarn", 4.0, 32768),
    ),
    "Phi-3-mini-128k": (
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {**lists(64), "type": "su"},
        },
        ("longrope", 32.0, 4096),
    ),
    "linear, version 4": (
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
        ("linear", 8.0, 4096),
    ),
    "GLM-4": (
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "partial_rotary_factor": 0.5,
        },
        ("none", 1.0, 8192),
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_reads_configs_as_they_are_published(model):
    config, expected = PUBLISHED[model]
    scaling = scaling_from_hf(config)
    assert (scaling.name, scaling.factor, scaling.original_length) == expected
    assert scaling.base == config.get("rope_theta", 1e4)


@pytest.mark.parametrize("name", sorted(set(UNTRAINED) - {"rope-theta"}))
def test_an_imported_scaling_becomes_settings_of_a_run(name):
    scaling = example(name)
    extension = ExtensionConfig(
        train_length=4096, target_length=32768, **rope_settings(scaling), position_strategy="full"
    )
    assert extension.scaling(64) == scaling.at_length(32768)
    stored = json.loads(json.dumps(extension.to_dict()))
    assert ExtensionConfig.from_dict(stored).scaling(64) == scaling.at_length(32768)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "clex"}, "'clex': it must be one of"),
        ({"rope_type": "linear"}, "'linear': it needs 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "'high_freq_factor'"),
        ({"rope_type": "longrope", "factor": 8.0}, "'short_factor'"),
        ({"full_attention": {"rope_type": "default"}}, "differ by layer type"),
        ({"rope_type": "linear", "factor": 0.5}, "--rope-factor"),
    ],
)
def test_what_cannot_be_read_is_named(parameters, message):
    config = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 8}
    with pytest.raises(ValueError, match=message):
        scaling_from_hf(config | {"rope_parameters": parameters})
