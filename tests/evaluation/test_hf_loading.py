# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder is scored with all of its weights and as its config.json says, or not."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hf_models as models

from megatron_cream.errors import UserError
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.other_rope import changed_fields


@pytest.fixture
def source(small_hf, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(small_hf, tmp_path / "model"))


def refuses(source, match):
    with pytest.raises(UserError, match=match) as error:
        HuggingFaceModel(str(source), "float32", "cpu")
    assert str(source) in str(error.value)


def change(source, edit):
    loaded = load_file(source / "model.safetensors")
    edit(loaded)
    save_file(loaded, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["layers.1.", "layers.0.mlp.up_proj.weight", "model.norm"])
def test_missing_weights_are_refused(source, part):
    def drop(loaded):
        for name in [name for name in loaded if part in name]:
            del loaded[name]

    change(source, drop)
    refuses(source, r"its weights lack \d tensors of the model .*: model\.")


def test_a_missing_output_layer_is_refused_where_it_is_not_the_embedding(source):
    change(source, lambda loaded: loaded.pop("lm_head.weight"))
    refuses(source, "its weights lack 1 tensors .*: lm_head.weight")
    models.edit_config(source, tie_word_embeddings=True)
    HuggingFaceModel(str(source), "float32", "cpu")


def test_more_weights_than_the_model_has_are_refused(source):
    models.edit_config(source, num_hidden_layers=1)
    refuses(source, r"its weights have 9 tensors that the model .* no place for: model.layers.1")


def test_other_shapes_are_refused(source):
    models.edit_config(source, intermediate_size=48)
    refuses(source, r"have 6 tensors of other shapes than its config.json .*mlp.down_proj.weight")


def test_frequencies_of_old_checkpoints_are_not_missed(source):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(source, lambda loaded: loaded.update({name: torch.ones(4)}))
    HuggingFaceModel(str(source), "float32", "cpu")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rms_norm_eps": math.nan}, "rms_norm_eps in config.json is nan"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta in config.json is 0"),
        ({"max_position_embeddings": 1e30}, "max_position_embeddings in config.json is 1e"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers in config.json"),
        ({"hidden_size": "32"}, "hidden_size in config.json is '32'"),
        ({"model_type": "no_such_model"}, "transformers cannot load it"),
        ({"architectures": ["NoSuchModel"], "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"architectures": None, "num_attention_heads": "x"}, "transformers cannot load it"),
    ],
)
def test_values_that_no_model_has_are_refused(source, changes, match):
    models.edit_config(source, **changes)
    refuses(source, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_none_is_named(source, text):
    (source / "config.json").write_text(text)
    refuses(source, r"config.json is not (a JSON object|JSON)")
    with pytest.raises(UserError, match=r"config.json is not (a JSON object|JSON)"):
        changed_fields(asked(source))


def asked(source):
    """The command line's wish for another RoPE."""
    flags = {"rope_interpolation": "yarn", "rope_factor": 4.0, "rope_theta": None}
    return Namespace(hf=str(source), rope_options=None, rope_factors_file=None, **flags)


def test_another_rope_of_a_broken_config_is_refused(source):
    changed_fields(asked(source))
    models.edit_config(source, hidden_size="32", head_dim=None)
    with pytest.raises(UserError, match=f"{source}: hidden_size in config.json is '32'"):
        changed_fields(asked(source))


def test_damaged_weights_are_named(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refuses(source, "model.safetensors is cut off")
    path.unlink()
    refuses(source, "transformers cannot load it")


def test_another_rope_replaces_all_of_its_own(source):
    """An original window that a config.json has at its top would have priority otherwise."""
    from megatron_cream.rope import hf_rope_fields, make_scaling

    models.edit_config(source, original_max_position_embeddings=64)
    lists = {key: [1.0 + pair for pair in range(4)] for key in ("short_factor", "long_factor")}
    kinds = {"yarn": {}, "longrope": lists}
    for name, options in kinds.items():
        scaling = make_scaling(name, dim=8, factor=4.0, original_length=512, **options)
        rope = json.loads(json.dumps(hf_rope_fields(scaling, 2048)))
        config = HuggingFaceModel(str(source), "float32", "cpu", rope=rope).module.config
        assert config.rope_parameters["original_max_position_embeddings"] == 512
