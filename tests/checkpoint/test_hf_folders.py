# SPDX-License-Identifier: Apache-2.0
"""Folders that others made, and the places beside them: read whole or refused, never removed."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import hf_models as models

from megatron_cream import ownership
from megatron_cream.checkpoint.hf_folder import (
    INDEX,
    SINGLE,
    HfWeights,
    find_hf_folder,
    list_other_files,
    read_config,
    read_source_name,
)
from megatron_cream.checkpoint.hf_writer import (
    SourceModel,
    TensorPlan,
    cut_into_shards,
    model_card,
    parse_bytes,
    write_shards,
)
from megatron_cream.checkpoint.model_shape import ModelShape, shape_from_config
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.ownership import staged, validate_output
from megatron_cream.rope import scaling_from_hf

# A place for unfinished work.


def write(output, name="weights", **options):
    with staged(output, 0, **options) as folder:
        (folder / name).write_text("new")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.fixture
def theirs(tmp_path):
    """A user's own folder, at the place where unfinished work would be kept."""
    folder = tmp_path / "m2.partial"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_of_the_user_is_never_removed(theirs, tmp_path, fails):
    with pytest.raises(UserError, match=r"m2.partial holds config.json and was not made by this"):
        write(tmp_path / "m2", reads=[tmp_path / "elsewhere"])
    with pytest.raises(UserError, match=r"m2.partial, where unfinished work is kept"):
        write(tmp_path / "m2", reads=[theirs])
    assert files(tmp_path) == ["m2.partial", "m2.partial/config.json"]


def test_nor_through_a_link(theirs, tmp_path):
    theirs.rename(tmp_path / "real")
    theirs.symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="is a link"):
        write(tmp_path / "m2")
    (tmp_path / "source").symlink_to(theirs)
    with pytest.raises(UserError, match="m2.partial"):
        write(tmp_path / "m2", reads=[tmp_path / "source"])
    assert files(tmp_path / "real") == ["config.json"]


def test_a_finished_output_is_nobodys_place_for_unfinished_work(tmp_path):
    """Not even if its process was killed between its name and the removal of the mark."""
    write(tmp_path / "m2.partial")
    ownership.mark(tmp_path / "m2.partial", "conversion to m2.partial")
    with pytest.raises(UserError, match="of another kind .conversion to m2.partial"):
        write(tmp_path / "m2")
    assert (tmp_path / "m2.partial/weights").read_text() == "new"


def test_unfinished_work_is_removed_by_the_next_attempt_alone(tmp_path):
    partial = tmp_path / "m2.partial"
    partial.mkdir()
    ownership.mark(partial, "conversion to m2")
    (partial / "old").write_text("half")
    write(tmp_path / "m2")
    assert files(tmp_path) == ["m2", "m2/weights"]


def test_two_conversions_to_one_output_are_kept_apart(tmp_path):
    with staged(tmp_path / "m2", 0) as folder:
        (folder / "first").write_text("first")
        with pytest.raises(BlockingIOError, match=r"--output is .*m2: another process is writing"):
            write(tmp_path / "m2")
        assert (folder / "first").read_text() == "first"
    assert files(tmp_path) == ["m2", "m2/first"]
    with pytest.raises(UserError, match="it exists"):
        write(tmp_path / "m2")


def test_the_second_looks_again_once_the_first_has_ended(tmp_path, monkeypatch):
    """It had found the output free, and waited for the place of unfinished work."""
    own = ownership.lock

    def late(*args):
        monkeypatch.setattr(ownership, "lock", own)
        write(tmp_path / "m2")
        return own(*args)

    monkeypatch.setattr(ownership, "lock", late)
    with pytest.raises(UserError, match="it exists"):
        write(tmp_path / "m2", name="second")
    assert files(tmp_path) == ["m2", "m2/weights"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, OSError])
def test_a_failed_attempt_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "m2", 0) as folder:
        (folder / "half").write_text("half")
        raise error("stopped")
    assert files(tmp_path) == []


def test_an_output_that_is_a_link_is_made_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m2").symlink_to(tmp_path / "disk")
    write(tmp_path / "m2")
    assert (tmp_path / "m2").is_symlink()
    assert files(tmp_path / "disk") == ["weights"]


@pytest.mark.parametrize("output", ["", ".", "/", "/proc"])
def test_outputs_that_cannot_be_made(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--output is .*must be|--output is .*a disk is mounted"):
        validate_output(Path(output))


def test_a_place_where_a_disk_is_mounted(tmp_path, monkeypatch):
    """It cannot be renamed to: said before the work, not behind it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match="a disk is mounted there"):
        validate_output(tmp_path / "disk")
    validate_output(tmp_path / "disk/model")


@pytest.mark.parametrize("name", ["", "nothing", "folder/file.safetensors", "/nowhere/model"])
def test_sources_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="--hf is .*it must be a folder"):
        find_hf_folder(name)


@pytest.mark.parametrize(
    ("text", "count"), [("1KB", 10**3), ("500MB", 5 * 10**8), ("5GB", 5 * 10**9), ("2 gb", 2e9)]
)
def test_sizes_of_shards(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "5", "0GB", "-1GB", "1.5GB", "1e3MB", "GB", "9" * 5000 + "GB", "nanGB", "5GiB"]
)
def test_sizes_of_shards_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size is .*it must be a size such as 500MB"):
        parse_bytes(text)


def test_shards_are_filled_and_indexed(tmp_path):
    """By the sizes asked for: as few files as hold them in order, and a total of all bytes."""
    plans = [TensorPlan(f"t{n}", torch.float32, (n + 1, 3)) for n in range(9)]
    shards = cut_into_shards(plans, 200)
    sizes = [sum(plan.nbytes for plan in shard) for shard in shards]
    assert [plan for shard in shards for plan in shard] == plans
    assert all(size <= 200 for size in sizes)
    for shard, size in zip(shards[1:], sizes, strict=False):
        assert size + shard[0].nbytes > 200, "the next tensor would have fitted"
    write_shards(tmp_path, plans, 200, (np.full(plan.nbytes, 7, np.uint8) for plan in plans))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * 3 * 45
    for path in tmp_path.glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0, "data is aligned, as readers that map it expect"
    assert HfWeights(tmp_path).tensors["t8"].shape == (9, 3)


def test_the_card_says_the_window_that_is_served(tmp_path):
    """Not the tokens of a training sample, beyond which the model was made to read."""
    shape = ModelShape("LlamaForCausalLM", 2, 32, 48, 2, 2, 16, 384, 1e-6, tied=False)
    extension = ExtensionConfig(64, 256, 96, position_strategy="pose")
    lines = model_card(SourceModel("org/base", 96), shape, extension, "float32").splitlines()
    assert {"# org/base, 256 tokens", "| window | 256 tokens |"} <= {*lines}
    assert "| tokens per training sample | 64 |" in lines
    text = " ".join(lines)
    assert "extended from 96 to 256 tokens" in text
    assert "--max-model-len 256`" in text and "--context-length 256`" in text


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves no folder of the right name with files that were never written."""
    written, own = [], os.fsync

    def fsync(descriptor):
        own(descriptor)
        written.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "m").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(tmp_path / "m", 0) as folder:
        (folder / "sub").mkdir()
        for name in ("config.json", "sub/weights"):
            (folder / name).write_text("x")
    before = {path for path, named in written if not named}
    names = ("", "/config.json", "/sub", "/sub/weights")
    assert before >= {str(tmp_path / "m.partial") + name for name in names}
    assert [path for path, named in written if named] == [str(tmp_path / "m"), str(tmp_path)]


# Links.


@pytest.fixture
def cache(tmp_path):
    """A snapshot of a hub's cache, whose files are links to blobs."""
    root = tmp_path / "models--owner--name"
    snapshot, blobs = root / "snapshots/0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, blob in (("config.json", "a" * 40), ("LICENSE", "b" * 64)):
        (blobs / blob).write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_an_index_of_weights_is_not_taken_over(tmp_path):
    """It would name files that are not there, and readers look at it first."""
    for name in (INDEX, "pytorch_model.bin.index.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in list_other_files(tmp_path)] == ["tokenizer.json"]


def test_links_of_a_hubs_cache_are_followed(cache, tmp_path):
    assert [path.name for path in list_other_files(cache)] == ["LICENSE", "config.json"]
    local = tmp_path / "local"  # as --local-dir was laid out once
    local.mkdir()
    (local / "tokenizer.json").symlink_to(cache.parent.parent / "blobs" / ("a" * 40))
    (local / "extra.json").symlink_to("../local/real.json")
    (local / "real.json").write_text("{}")
    names = [path.name for path in list_other_files(local)]
    assert names == ["extra.json", "real.json", "tokenizer.json"]


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("where", ["id_rsa", "blobs/id_rsa", "models--a--b/blobs/id_rsa"])
def test_a_link_to_anywhere_else_is_refused(tmp_path, name, where):
    secret = tmp_path / where
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link to .*id_rsa, outside the model"):
        list_other_files(model)
    secret.unlink()
    with pytest.raises(UserError, match=f"{name} is a link to .*id_rsa, which is not there"):
        list_other_files(model)


# Weights.


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(first, last, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


BROKEN = {
    "overlapping": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "overlapping in part": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "uncovered in the middle": ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "uncovered at the start": ({"a": entry(8, 16)}, 16),
    "uncovered at the end": ({"a": entry(0, 8)}, 20),
    "negative": ({"a": entry(-8, 0)}, 20),
    "reversed": ({"a": entry(8, 0)}, 8),
    "cut off": ({"a": entry(0, 8)}, 7),
    "size of another shape": ({"a": entry(0, 8, (3,))}, 8),
    "shape of text": ({"a": entry(0, 8, ("2",))}, 8),
    "shape with a fraction": ({"a": entry(0, 8, (2.5,))}, 8),
    "overflowing shape": ({"a": entry(0, 8, (2**62, 8))}, 8),
    "type that is none": ({"a": entry(0, 8, (2,), "F77")}, 8),
    "type that is no text": ({"a": entry(0, 8, (2,), 4)}, 8),
    "entry that is a list": ({"a": [0, 8]}, 8),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8),
    "list": ([1, 2], 0),
    "nested without end": (b"[" * 100_000, 0),
    "no text": (b"\xff\xfe\x00", 0),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_headers_that_the_safetensors_library_refuses(kind, tmp_path):
    header, size = BROKEN[kind]
    write_raw(tmp_path / SINGLE, header, bytes(size))
    with pytest.raises(UserError, match="model.safetensors is cut off, damaged or no safetensors"):
        HfWeights(tmp_path)


def test_a_header_that_is_right_is_read_as_it_says(tmp_path):
    one, two = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.int64)
    save_file({"a": one, "b": two}, tmp_path / SINGLE, metadata={"format": "pt"})
    weights = HfWeights(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in weights.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", (4,)),
    }
    row = bytearray(12)
    weights.read_rows("a", 1, 2, memoryview(row))
    weights.close()
    assert struct.unpack("<3f", row) == (3.0, 4.0, 5.0)


@pytest.mark.parametrize(
    "file",
    ["../../etc/x.safetensors", "/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors"]
    + ["x.bin", "..", "", 5, None, ["x.safetensors"]],
)
def test_an_index_names_files_of_its_own_folder(file, tmp_path):
    (tmp_path / "model").mkdir()
    for place in ("x.safetensors", "model/x.safetensors", "model/x.bin"):
        save_file({"a": torch.ones(2)}, tmp_path / place)
    index = tmp_path / "model" / INDEX
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=f"{INDEX} says that 'a' is in .* in the same folder"):
        HfWeights(tmp_path / "model")


JUNK = ["", " ", "{", "[]", "null", '"text"', "[" * 100_000, "\xff", '{"weight_map": ']


@pytest.mark.parametrize("text", JUNK, ids=range(len(JUNK)))
def test_json_that_is_cut_or_something_else_is_named(text, tmp_path):
    for name, read in (("config.json", read_config), (INDEX, HfWeights)):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name} is not (a JSON object|JSON): "):
            read(tmp_path)


def test_what_the_source_was_called_is_one_line(tmp_path):
    (tmp_path / "imported_from.txt").write_bytes(b"owner/name\nlicense: mine\xff\n")
    assert read_source_name(tmp_path) == "owner/name"


# config.json.

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 120,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
COUNTS = [key for key, value in CONFIG.items() if isinstance(value, int)]


def read(**changes):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return shape_from_config(config), scaling_from_hf(config)


def test_the_config_that_the_others_are_made_of_is_read():
    shape, scaling = read()
    assert (shape.layers, shape.experts, shape.head_dim, scaling.base) == (4, 4, 16, 1e4)


@pytest.mark.parametrize("key", [*COUNTS, "head_dim", "sliding_window"])
@pytest.mark.parametrize(
    "value", [0, -1, 1e30, 10**30, 2.5, math.nan, math.inf, "8", True, [8], {"a": 8}, 10**400]
)
def test_counts_are_positive_integers(key, value):
    with pytest.raises(UserError, match=f"{key} in config.json is .*it must be a positive integer"):
        read(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, "1e-6", True, [1], 10**400])
def test_numbers_are_finite_and_positive(key, value):
    with pytest.raises(UserError, match=f"{key} in config.json is .*it must be a finite number"):
        read(**{key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", 0.5, 2, []])
def test_switches_are_true_or_false(key, value):
    with pytest.raises(UserError, match=f"{key} in config.json is .*it must be true or false"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers .* of at most 100000"),
        ({"num_local_experts": 10**12}, "num_local_experts .* of at most 100000"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok in config.json is 5: .* at most 4"),
        ({"rms_norm_eps": 1}, "rms_norm_eps in config.json is 1: it must be below 1"),
        ({"hidden_size": 60}, "a head has 15 dimensions"),
        ({"hidden_size": 2}, "head_dim in config.json|a head has 0 dimensions"),
        ({"head_dim": 1}, "a head has 1 dimensions"),
        ({"architectures": []}, r"architectures in config.json is \[\]"),
        ({"architectures": "MixtralForCausalLM"}, "architectures in config.json is 'Mixtral"),
        ({"architectures": [["a"]]}, r"architectures in config.json is \[\['a'\]\]"),
        ({"architectures": 5}, "architectures in config.json is 5"),
        ({"model_type": "llama"}, "model_type in config.json is 'llama': .* 'mixtral'"),
        ({"hidden_act": ["silu"]}, "hidden_act in config.json"),
        ({"hidden_act": None}, "hidden_act in config.json is None"),
        ({"vocab_size": ...}, "vocab_size in config.json is missing"),
        ({"max_position_embeddings": ...}, "max_position_embeddings in config.json is missing"),
        ({"rope_scaling": [1]}, r"rope_scaling in config.json is \[1\]: it must be a JSON object"),
        ({"rope_parameters": "yarn"}, "rope_parameters in config.json is 'yarn'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type in config.json is \['yarn'\]"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta in config.json is 0"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta in config.json is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor in config.json is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor in config.json is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor in config.json"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "--rope-factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": math.nan}},
            "beta_fast in config.json is nan: it must be finite",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": "x"}}, "beta_fast"),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings in config.json is 0",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 7}},
            "long_factor .* 8 positive numbers",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1] * 8,
                    "long_factor": [math.inf] * 8,
                }
            },
            "long_factor in config.json is .* it must be finite",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor in config.json is 1.5: .*at most"),
    ],
)
def test_values_that_no_model_has(changes, match):
    with pytest.raises(UserError, match=match):
        read(**changes)


@pytest.mark.parametrize("name", ["Mixtral", "Mistral, no window", "Qwen2, tied", "Llama"])
def test_what_is_not_said_is_what_transformers_takes(name, tmp_path):
    """By the config of transformers itself, for each field that it has a default for."""
    from transformers import AutoConfig

    source = models.make(tmp_path, name, num_attention_heads=32, head_dim=4)
    for key in ("num_key_value_heads", "sliding_window", "rope_parameters", "head_dim"):
        models.edit_config(source, **{key: None})
    theirs = AutoConfig.from_pretrained(source)
    shape = shape_from_config(json.loads((source / "config.json").read_text()))
    scaling = scaling_from_hf(json.loads((source / "config.json").read_text()))
    assert shape.groups == theirs.num_key_value_heads
    assert shape.window == theirs.sliding_window if "Mi" in name else shape.window is None
    assert scaling.base == theirs.rope_parameters["rope_theta"]
