# SPDX-License-Identifier: Apache-2.0
"""RoPE's flags and files: the settings they make, and one clear line where they make none."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_cream.config import ExtensionConfig
from megatron_cream.rope import flags as rope_flags
from megatron_cream.training.arguments import add_arguments, extension_from_args

LLAMA31 = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture
def extension():
    """Makes settings out of flags, with the few of Megatron's flags that they look at."""

    def make(*flags):
        parser = add_arguments(argparse.ArgumentParser())
        parser.add_argument("--seq-length", type=int, default=4096)
        parser.add_argument("--rotary-base", type=int, default=10000)
        parser.set_defaults(seed=1234, hidden_size=4096, num_attention_heads=32, kv_channels=128)
        parser.set_defaults(rotary_percent=1.0)
        return extension_from_args(parser.parse_args(flags))

    return make


@pytest.fixture
def written(tmp_path):
    def write(values):
        path = tmp_path / f"values{len(list(tmp_path.iterdir()))}.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


def factors(pairs=64):
    return {"short_factor": [1.0] * pairs, "long_factor": [1.0 + i for i in range(pairs)]}


T32K = ("--target-length", "32768")


def test_defaults(extension):
    assert extension().rope_interpolation == "none"
    longer = extension(*T32K)
    assert (longer.rope_interpolation, longer.rope_factor) == ("yarn", 8.0)
    raised = extension(*T32K, "--rope-theta", "5e5")
    assert raised.rope_interpolation == "rope-theta"
    assert raised.scaling(128).theta == 5e5
    assert raised.scaling(128).stretch.max() < 50


@pytest.mark.parametrize(
    ("flags", "sigma", "relative"),
    [
        (["--target-length", "32768"], 3.0, None),
        (["--target-length", "32769"], 3.0, 0.375),
        (["--target-length", "262144", "--cream-sigma", "3"], 3.0, None),
        (["--target-length", "262144", "--cream-sigma-relative", "0.5"], 3.0, 0.5),
        (["--target-length", "262144", "--position-strategy", "pose"], 3.0, None),
    ],
)
def test_creams_width_is_relative_above_8_times_the_window(extension, flags, sigma, relative):
    made = extension(*flags)
    saved = made.to_dict()
    assert (saved["cream_sigma"], saved["cream_sigma_relative"]) == (sigma, relative)


def test_options_and_theta_reach_the_scaling(extension):
    words = ("--rope-options", "beta_fast=16", "truncate=false", "attention_factor=1.5")
    made = extension(*T32K, "--rope-interpolation", "yarn", "--rope-theta", "1e6", *words)
    scaling = made.scaling(128)
    assert scaling.options == {"beta_fast": 16, "truncate": False, "attention_factor": 1.5}
    assert scaling.theta == 1e6
    assert scaling.attention_factor == 1.5


@pytest.mark.parametrize("wrapped", ["", "rope_scaling", "rope_parameters"])
def test_factors_come_from_a_file(extension, written, wrapped):
    path = written({wrapped: factors()} if wrapped else factors())
    made = extension(*T32K, "--rope-interpolation", "longrope", "--rope-factors-file", path)
    assert list(made.scaling(128).divisors) == factors()["long_factor"]
    unextended = extension("--rope-interpolation", "longrope", "--rope-factors-file", path)
    assert list(unextended.scaling(128).divisors) == factors()["short_factor"]


def test_a_scaled_base_is_divided_further(extension, written):
    made = extension(
        *("--seq-length", "4096", "--original-length", "131072", "--target-length", "1048576"),
        *("--rotary-base", "500000", "--rope-base-config", written(LLAMA31)),
    )
    scaling = made.scaling(128)
    assert scaling.divisors.min() == 8.0
    assert scaling.divisors.max() == 64.0
    assert "on llama3, factor 8 over 8192 tokens" in scaling.summary


def test_settings_survive_a_checkpoint(extension, written):
    base = {**LLAMA31, "rope_theta": 10000.0}
    for flags in (
        ("--rope-interpolation", "longrope", "--rope-factors-file", written(factors())),
        ("--rope-interpolation", "llama3", "--rope-options", "low_freq_factor=0.5"),
        ("--rope-theta", "5e5"),
        ("--rope-base-config", written(base)),
    ):
        made = extension(*T32K, *flags)
        stored = json.loads(json.dumps(made.to_dict()))
        assert ExtensionConfig.from_dict(stored) == made
        assert made.differences(ExtensionConfig.from_dict(stored)) == []
        hash(made)


def test_settings_of_older_checkpoints_are_read(extension):
    made = extension(*T32K)
    stored = made.to_dict()
    for newer in ("rope_theta", "rope_options", "rope_base"):
        del stored[newer]
    assert ExtensionConfig.from_dict(stored) == made


def test_differences_name_the_flags(extension, written):
    plain = extension(*T32K, "--rope-interpolation", "linear")
    based = extension(*T32K, "--rope-base-config", written({**LLAMA31, "rope_theta": 10000.0}))
    (difference,) = plain.differences(based)
    assert difference.startswith("--rope-base-config None != ")
    yarns = [
        extension(*T32K, "--rope-interpolation", "yarn", "--rope-options", f"beta_fast={beta}")
        for beta in (16, 32)
    ]
    assert yarns[0].differences(yarns[1]) == [
        "--rope-options {'beta_fast': 16} != {'beta_fast': 32}"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rope-interpolation", "dynamic"], "'dynamic'.*evaluation only.*linear, ntk, .*yarn"),
        (["--rope-interpolation", "rope-theta"], "--rope-theta.* is missing"),
        (["--rope-interpolation", "none", "--rope-theta", "5e5"], "--rope-theta.*500000.*none"),
        (["--rope-theta", "-1"], "--rope-theta.* is -1"),
        (["--rope-options", "beta=32"], "beta: yarn takes beta_fast"),
        (["--rope-options", "beta_fast"], "'beta_fast': it must be KEY=VALUE"),
        (["--rope-options", "a=1", "a=2"], "a twice"),
        (["--rope-options", "a=x"], "'a=x': the value must be a number"),
        (["--rope-interpolation", "longrope"], "short_factor is missing.*--rope-factors-file"),
        (["--rope-factors-file", "nowhere.json"], "--rope-factors-file is nowhere.json: there is"),
        (["--rope-base-config", "nowhere.json"], "--rope-base-config is nowhere.json: there is"),
    ],
)
def test_refused_flags(extension, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        extension(*T32K, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (factors(48), "short_factor .* a list of 48: it must be 64 positive numbers"),
        ({"long_factor": [1.0]}, "it must have short_factor"),
        ({**factors(), "short_factor": ["1"] * 64}, "positive numbers"),
        ("{", "must be a JSON file"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_refused_factor_files(extension, written, values, message):
    flags = ["--rope-interpolation", "longrope", "--rope-factors-file", written(values)]
    with pytest.raises(ValueError, match=message):
        extension(*T32K, *flags)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({}, [], "--rope-base-config is .*: max_position_embeddings .* is missing"),
        (LLAMA31, [], "--rotary-base.* is 10000: .* rope_theta is 500000"),
        (LLAMA31, ["--rope-interpolation", "yarn"], "'yarn'.*it must be 'linear' or 'ntk'"),
        ({**LLAMA31, "rope_scaling": {"type": "clex"}}, [], "'clex'"),
    ],
)
def test_refused_bases(extension, written, config, flags, message):
    with pytest.raises(ValueError, match=message):
        extension(*T32K, "--rope-base-config", written(config), *flags)


def test_files_of_another_encoding_are_refused(tmp_path):
    path = Path(tmp_path) / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a JSON file"):
        rope_flags.read_factors(str(path))
