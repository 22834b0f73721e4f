# SPDX-License-Identifier: Apache-2.0
"""Another RoPE than the model's own, on a Hugging Face folder and on a checkpoint."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.arguments import arguments
from support.evaluation import run
from transformers import AutoModelForCausalLM

from megatron_cream.evaluation.evaluate import open_model
from megatron_cream.evaluation.result_files import read_result

# As a person writes them into config.json; the small model's window is 512 and theta 10000.
BY_HAND = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 512},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "rope-theta": {"rope_theta": 80000.0},
}


def flags(name):
    if name == "rope-theta":
        return {"rope_interpolation": name, "rope_theta": 80000.0}
    return {"rope_interpolation": name, "rope_factor": 4.0}


@pytest.mark.parametrize("name", BY_HAND)
def test_hidden_states_are_those_of_a_config_written_by_hand(name, small_hf, tmp_path):
    folder = shutil.copytree(small_hf, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4} | BY_HAND[name]
    if name in ("linear", "yarn", "llama3"):
        config["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    wanted = AutoModelForCausalLM.from_pretrained(folder)
    found = open_model(arguments(hf=small_hf, **flags(name)))
    assert found.window == wanted.config.max_position_embeddings
    tokens = torch.randint(0, 384, (1, 900), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = [
            model.model(tokens.to(model.device)).last_hidden_state
            for model in (found.module, wanted.to(found.device))
        ]
        plain = open_model(arguments(hf=small_hf)).module.model(tokens.to(found.device))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states[0], plain.last_hidden_state, atol=1e-2)


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize("name", ["linear", "ntk", "yarn", "yarn-pose"])
def test_a_checkpoint_and_a_folder_agree(name, small_hf, tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    import_checkpoint(small_hf, str(tmp_path / "import"), quiet=True)
    asked = {"tasks": ["passkey"], "lengths": [640], **flags(name)}
    run(arguments(hf=small_hf, output=f"{tmp_path}/hf", **asked))
    run(arguments(checkpoint=str(tmp_path / "import"), output=f"{tmp_path}/mcore", **asked))
    assert read_result(tmp_path / "mcore")["window"] == read_result(tmp_path / "hf")["window"]
    ours, theirs = (read_result(tmp_path / kind)["lengths"][0] for kind in ("mcore", "hf"))
    assert ours["cases"] == theirs["cases"] == 6
    assert ours["logprob"] == pytest.approx(theirs["logprob"], rel=1e-4)


def test_it_is_kept_with_the_run(small_hf, tmp_path):
    asked = {"tasks": ["passkey"], "hf": small_hf, "lengths": [640], "output": f"{tmp_path}/run"}
    table = run(arguments(**asked, **flags("yarn")))
    assert "window 2K" in table and "\\*" not in table
    assert read_result(tmp_path / "run")["rope"]["rope_type"] == "yarn"
    with pytest.raises(ValueError, match="it has a run of other settings"):
        run(arguments(**asked, **flags("linear")))


def test_what_cannot_be_changed(small_hf, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            open_model(arguments(**{"hf": small_hf, **changes}))

    refused("--rope-factor is not given: .* yarn changes nothing", rope_interpolation="yarn")
    refused("--rope-factor is 2: without an interpolation", rope_factor=2.0)
    refused("--rope-interpolation is clex with --hf: its angles are trained", **flags("clex"))
    folder = Path(shutil.copytree(small_hf, tmp_path / "hf"))
    (folder / "config.json").write_text(json.dumps({"text_config": {}}))
    refused("has a text_config, whose RoPE cannot be changed", hf=str(folder), **flags("yarn"))
    with pytest.raises(FileNotFoundError, match="--hf is nowhere"):
        open_model(arguments(hf="nowhere", **flags("yarn")))


def checkpoint_of(tmp_path, **settings):
    """A folder that says it was trained so, without weights, and its export's config.json."""
    from megatron_cream.config import ExtensionConfig
    from megatron_cream.rope import hf_rope_fields

    extension = ExtensionConfig(**{"train_length": 256, "target_length": 2048, **settings})
    fields = hf_rope_fields(extension.scaling(8), extension.target_length)
    config = {"hidden_size": 32, "num_attention_heads": 4, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Namespace(megatron_cream=extension.to_dict())


@pytest.mark.parametrize("own", ["none", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("name", ["linear", "yarn", "ntk", "dynamic", "rope-theta"])
def test_checkpoint_and_folder_claim_the_same_window(own, name, tmp_path, monkeypatch):
    from megatron_cream.evaluation import other_rope
    from megatron_cream.rope.huggingface import claimed_window

    factor = 1.0 if own == "none" else 8.0
    trained = {"rope_interpolation": own, "rope_factor": factor}
    original = 2048 if own == "none" else 256
    saved = checkpoint_of(tmp_path, original_length=original, **trained)
    monkeypatch.setattr(other_rope, "read_saved_arguments", lambda path: saved)
    asked = {"rope_interpolation": name, "rope_factor": 4.0}
    asked |= {"rope_theta": 80000.0} if name == "rope-theta" else {}
    found = other_rope.changed_extension(arguments(checkpoint="run", **asked))
    fields = other_rope.changed_fields(arguments(hf=str(tmp_path), **asked))
    claimed = claimed_window(found.rope_interpolation, found.original_length, found.target_length)
    assert claimed == fields["max_position_embeddings"]
    assert claimed == (original if name == "dynamic" else 4 * original)


def test_positions_of_training_do_not_hinder_another_window(tmp_path, monkeypatch):
    from megatron_cream.evaluation import other_rope

    saved = checkpoint_of(
        tmp_path, original_length=256, train_length=1024, position_strategy="cream",
        position_options={"head_lengths": (500,)}, rope_interpolation="linear", rope_factor=8.0,
    )  # fmt: skip
    monkeypatch.setattr(other_rope, "read_saved_arguments", lambda path: saved)
    asked = arguments(checkpoint="run", rope_interpolation="yarn", rope_factor=2.0)
    assert other_rope.changed_extension(asked).target_length == 512


@pytest.mark.parametrize("factor", [float("inf"), 1e30, float("nan")])
def test_a_factor_without_a_window(small_hf, factor):
    asked = arguments(hf=small_hf, rope_interpolation="yarn", rope_factor=factor)
    with pytest.raises(ValueError, match="--rope-factor"):
        open_model(asked)
