# SPDX-License-Identifier: Apache-2.0
"""The table of shapes against transformers and published sizes; names and folders."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_cream.planning.models import MODELS, find_model, megatron_flags

# Elements of the published checkpoints.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


def hf_config(shape):
    """The config.json of a shape, as transformers writes it."""
    fields = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.trained_length,
        "rope_parameters": {"rope_type": shape.rope_type, "rope_theta": shape.theta},
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied,
    }
    if shape.rope_type != "default":
        fields["rope_parameters"] |= {
            "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.rope_original,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    if shape.family.model_type == "mistral":
        fields["sliding_window"] = None  # or transformers limits it to 4096
    if shape.experts:
        fields |= {"num_local_experts": shape.experts}
        fields |= {"num_experts_per_tok": shape.experts_per_token}
    config = AutoConfig.for_model(shape.family.model_type, **fields)
    config.architectures = [shape.architecture]
    return config


SMALL = dataclasses.replace(MODELS["qwen2.5-7b"], layers=2, hidden=96, ffn=160, vocabulary=1000)
QWEN3 = dataclasses.replace(
    SMALL,
    architecture="Qwen3ForCausalLM",
    **{"qkv_bias": False, "qk_norm": True, "heads": 6, "groups": 2, "head_dim": 32},
)
SHAPES = [*MODELS.values(), dataclasses.replace(QWEN3, name="qwen3-like")]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_parameters_are_those_that_transformers_builds(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(shape))
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_parameters_are_the_published_ones():
    assert {name: shape.parameters for name, shape in MODELS.items()} == PUBLISHED


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_folder_reads_back_as_its_shape(shape, tmp_path):
    hf_config(shape).save_pretrained(tmp_path)
    assert find_model(str(tmp_path)) == dataclasses.replace(shape, name=tmp_path.name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama2-70B-chat", "llama-2-70b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
        ("mistral-7b", "mistral-7b-v0.3"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("codellama/CodeLlama-34b-hf", "codellama-34b"),
        ("Qwen/Qwen2.5-32B", "qwen2.5-32b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_names_as_people_type_them(name, found):
    assert find_model(name).name == found


def test_an_unknown_name_says_what_is_near_and_what_there_is():
    with pytest.raises(ValueError, match="did you mean llama-2-13b.*smollm2-135m"):
        find_model("llama-2-130b")
    with pytest.raises(ValueError, match="MODEL is 'mamba': it must be"):
        find_model("mamba")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architectures": None}, ["architectures", "None", "LlamaForCausalLM"]),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            | {"sliding_window": 4096},
            ["sliding_window", "4096"],
        ),
        ({"use_sliding_window": True, "sliding_window": 64}, ["use_sliding_window", "True"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"attention_bias": True, "mlp_bias": True}, ["attention_bias", "True", "off"]),
        ({"max_position_embeddings": ...}, ["config.json", "max_position_embeddings"]),
        ({"hidden_size": ...}, ["config.json", "hidden_size"]),
    ],
)
def test_a_config_that_cannot_be_served(tmp_path, change, parts):
    config = hf_config(MODELS["llama-2-7b"]).to_dict() | change
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        find_model(str(tmp_path))
    for part in parts:
        assert part in str(error.value)


def test_a_folder_without_or_with_a_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        find_model(str(tmp_path))


def test_flags_name_only_what_a_model_has():
    def flags(name):
        return [flag for theme in megatron_flags(MODELS[name]) for flag in theme]

    assert "--group-query-attention" not in flags("llama-2-7b")
    assert "--untie-embeddings-and-output-weights" not in flags("smollm2-135m")
    assert "--add-qkv-bias" in flags("qwen2.5-7b")
    assert "--kv-channels" not in flags("llama-3-70b")
    with_experts = [name for name in MODELS if "--num-experts" in flags(name)]
    assert with_experts == ["mixtral-8x7b"]
    assert "--kv-channels" in [flag for theme in megatron_flags(QWEN3) for flag in theme]
