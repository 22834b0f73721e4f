# SPDX-License-Identifier: Apache-2.0
"""What cannot be converted ends in one error, and never in a folder that looks whole."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from support import hf_models as models
from tqdm import tqdm

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A source in several shards, and its import."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("good")
    models.make(folder / "one")
    import_checkpoint(str(folder / "one"), str(folder / "imported"), quiet=True)
    export_checkpoint(
        str(folder / "imported"), str(folder / "source"), shard_bytes=200_000, quiet=True
    )
    return folder


@pytest.fixture
def source(good, tmp_path):
    """A copy to break."""
    shutil.copytree(good / "source", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def imported(good, tmp_path):
    shutil.copytree(good / "imported", tmp_path / "imported")
    return tmp_path / "imported"


def refuses_import(source, match, error=ValueError, dtype=None):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    output = source.parent / "out"
    with pytest.raises(error, match=match):
        import_checkpoint(str(source), str(output), dtype, quiet=True)
    assert not list(source.parent.glob("out*"))


def refuses_export(imported, match, error=ValueError, **options):
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    output = imported.parent / "out"
    with pytest.raises(error, match=match):
        export_checkpoint(str(imported), str(output), quiet=True, **options)
    assert not list(imported.parent.glob("out*"))


def shards(source):
    return sorted(source.glob("*.safetensors"))


def truncate(path, count):
    os.truncate(path, path.stat().st_size - count)


def rewrite(path, change):
    """Apply a change to the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    loaded = load_file(path)
    change(loaded)
    save_file(loaded, path, metadata={"format": "pt"})


def test_missing_shard(source):
    shards(source)[1].unlink()
    refuses_import(source, "lacks 1 of .* files that .*index.json names", FileNotFoundError)


def test_truncated_shard(source):
    truncate(shards(source)[-1], 10)
    refuses_import(source, "00003-of-.* is cut off, damaged or no safetensors file: .*not fully")


@pytest.mark.parametrize("size", [0, 5, 40])
def test_shard_cut_off_in_its_header(source, size):
    os.truncate(shards(source)[0], size)
    refuses_import(source, "00001-of-.* is cut off, damaged or no safetensors file")


def test_shard_that_is_none(source):
    shards(source)[0].write_bytes((20).to_bytes(8, "little") + b"x" * 100)
    refuses_import(source, "00001-of-.* no safetensors file: .*JSON")


def test_index_names_a_tensor_that_is_not_there(source):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.x"] = shards(source)[0].name
    path.write_text(json.dumps(index))
    refuses_import(source, "lacks model.layers.9.x, which .* says it has")


def test_index_that_is_none(source):
    (source / "model.safetensors.index.json").write_text("[]")
    refuses_import(source, "index.json is not a JSON object: it holds \\[\\]")
    (source / "model.safetensors.index.json").write_text("{}")
    refuses_import(source, "index.json is not an index of safetensors files")


def test_no_weights_in_safetensors(source):
    for path in shards(source):
        path.rename(path.with_suffix(".bin"))
    (source / "model.safetensors.index.json").unlink()
    refuses_import(source, "weights must be in safetensors files", FileNotFoundError)


def test_no_config(source):
    (source / "config.json").unlink()
    refuses_import(source, "has no config.json", FileNotFoundError)


def test_config_that_is_no_json(source):
    (source / "config.json").write_text("{")
    refuses_import(source, "config.json is not JSON")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["BertModel"]}, r"architectures in config.json is \['BertModel'\]"),
        ({"architectures": None}, "architectures in config.json is None"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type in config.json is 'spiral'"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu': it must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config in config.json"),
        ({"attention_bias": True}, "attention_bias and mlp_bias in config.json are True and False"),
        ({"num_key_value_heads": 3}, "num_key_value_heads in config.json is 3: it must divide"),
        ({"hidden_size": "64"}, "hidden_size in config.json is '64': it must be a positive"),
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json is missing"),
        ({"max_position_embeddings": 0}, "max_position_embeddings in config.json is 0"),
        (
            {"num_hidden_layers": 5},
            r"lacks 9 tensors that its config.json asks for: model.layers.4",
        ),
        ({"num_hidden_layers": 3}, r"has 9 tensors that LlamaForCausalLM has no place for"),
        ({"vocab_size": 128}, r"shape \[120, 64\], by config.json it must have \[128, 64\]"),
        ({"intermediate_size": 128}, r"shape \[\d+, \d+\], by config.json it must have"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "model_type in config.json is 'llama': .* whose type is 'qwen2'",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "lacks 12 tensors .*q_proj.bias|k_proj.bias",
        ),
    ],
)
def test_config_and_weights_that_disagree(source, changes, match):
    models.edit_config(source, **changes)
    refuses_import(source, match)


def test_types_that_are_mixed_need_a_choice(source, tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    def halve_one(loaded):
        name = min(loaded)
        loaded[name] = loaded[name].bfloat16()

    rewrite(shards(source)[0], halve_one)
    refuses_import(source, r"several types: 1 BF16 .*, \d+ F32 .*--dtype")
    imported = import_checkpoint(str(source), str(tmp_path / "o"), torch.bfloat16, quiet=True)
    assert imported.dtype == torch.bfloat16


def test_type_that_is_not_served(source):
    def count(loaded):
        name = min(loaded)
        loaded[name] = loaded[name].to(torch.int64)

    rewrite(shards(source)[0], count)
    refuses_import(source, "has type I64: it must be one of")


def test_no_such_folder_or_repository(tmp_path):
    refuses_import(tmp_path / "nothing", "--hf is .*it must be a folder", FileNotFoundError)


def test_output_that_exists(source, imported):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    before = sorted(path.name for path in imported.iterdir())
    with pytest.raises(ValueError, match="--output is .*it exists"):
        import_checkpoint(str(source), str(imported), quiet=True)
    with pytest.raises(ValueError, match="--output is .*it exists"):
        export_checkpoint(str(imported), str(imported), quiet=True)
    assert sorted(path.name for path in imported.iterdir()) == before


def test_tied_model_may_store_the_output_layer_if_it_is_equal(tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "source", "Llama, tied (SmolLM2)")

    def repeat(loaded):
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"].clone()

    rewrite(source / "model.safetensors", repeat)
    assert import_checkpoint(str(source), str(tmp_path / "out"), quiet=True).shape.tied


def test_frequencies_of_old_checkpoints_are_left_out(source, tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    def add(loaded):
        loaded["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    merged = models.tensors(source)
    for path in (*shards(source), source / "model.safetensors.index.json"):
        path.unlink()
    from safetensors.torch import save_file

    save_file(merged, source / "model.safetensors")
    rewrite(source / "model.safetensors", add)
    import_checkpoint(str(source), str(tmp_path / "out"), quiet=True)


def test_export_of_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing"):
        refuses_export(tmp_path / name, "must hold a torch_dist checkpoint", FileNotFoundError)
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    with pytest.raises(FileNotFoundError, match="--checkpoint is : it must hold"):
        export_checkpoint("", str(tmp_path / "out"), quiet=True)


def test_export_of_a_checkpoint_that_is_cut_off(imported):
    (data,) = (imported / "release").glob("*.distcp")
    truncate(data, 1)
    refuses_export(imported, r"has \d+ bytes, .metadata says \d+: it is cut off")


def test_export_of_a_checkpoint_that_lacks_a_file(imported):
    (data,) = (imported / "release").glob("*.distcp")
    shutil.copy(data, imported / "kept")
    from torch.distributed.checkpoint import FileSystemReader

    release = imported / "release"
    metadata = FileSystemReader(release).read_metadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == "output_layer.weight":
            info.relative_path = "__1_0.distcp"
    import pickle

    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    refuses_export(imported, "lacks its file __1_0.distcp", FileNotFoundError)


def test_export_of_damaged_bytes(imported):
    """Bytes that are no record any more are an error, not weights."""
    (data,) = (imported / "release").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[-3000:] = bytes(3000)
    data.write_bytes(content)
    refuses_export(imported, "cannot be read")


def test_export_with_the_config_of_another_model(imported, tmp_path):
    models.edit_config(imported / "hf", rms_norm_eps=1e-5)
    refuses_export(imported, r"of different models .*norm_epsilon 1e-06 != 1e-05")
    other = models.make(tmp_path / "other", "Qwen3, q and k norm")
    refuses_export(imported, "--qk-layernorm of the checkpoint is off", hf=str(other))


def test_export_of_fewer_rows_than_tokens(imported):
    """The two agree by what is saved beside them: only the weights themselves say it."""
    models.edit_config(imported / "hf", vocab_size=100_000)
    refuses_export(
        imported,
        r"embedding.word_embeddings.weight of the checkpoint has \d+ rows: the vocabulary"
        " has 100000 tokens",
    )


FULL = 300_000


def fill_disk(monkeypatch, folder, limit=FULL):
    """Have every write to files under ``folder`` fail once ``limit`` bytes are in them."""

    def used():
        return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())

    own = os.write

    def write(descriptor, data):
        if used() + len(data) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(descriptor, data)

    monkeypatch.setattr(os, "write", write)


def test_disk_that_becomes_full_in_an_export(imported, monkeypatch):
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    output = imported.parent / "out"
    with monkeypatch.context() as patch:
        fill_disk(patch, imported.parent / "out.partial")
        with pytest.raises(OSError, match="--output is .*its disk became full; nothing was kept"):
            export_checkpoint(str(imported), str(output), shard_bytes=100_000, quiet=True)
    assert not list(imported.parent.glob("out*"))
    export_checkpoint(str(imported), str(output), quiet=True)  # now that there is space
    assert models.tensors(output)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte; mounting one needs rights that a container may lack."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_too_small_is_refused_before_work(source, small_disk):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    with pytest.raises(ValueError, match=r"has 0.00 GB free, 0.00 GB are needed"):
        import_checkpoint(str(source), str(small_disk / "out"), quiet=True)
    assert not list(small_disk.iterdir())


def test_disk_that_becomes_full_in_an_import(source, small_disk, monkeypatch):
    from megatron_cream import ownership
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    plenty = shutil._ntuple_diskusage(1, 0, 1 << 40)
    monkeypatch.setattr(ownership.shutil, "disk_usage", lambda path: plenty)
    with pytest.raises(OSError, match="its disk became full; nothing was kept"):
        import_checkpoint(str(source), str(small_disk / "out"), quiet=True)
    assert not list(small_disk.iterdir())


def _slow_import(source, output):
    from megatron_cream.checkpoint import import_hf

    tqdm.set_lock(threading.RLock())  # its own is shared with the test, and would die locked
    own = import_hf._read_rows

    def slowly(*args):
        time.sleep(0.02)
        own(*args)

    import_hf._read_rows = slowly
    import_hf.import_checkpoint(source, output, quiet=True)


def test_killed_import_leaves_nothing_that_looks_whole(source, tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.iterations import find_checkpoint

    output = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(
        target=_slow_import, args=(str(source), str(output))
    )
    process.start()
    data = tmp_path / "out.partial/release/__0_0.distcp"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (data.is_file() and data.stat().st_size > 60_000):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    assert find_checkpoint(str(tmp_path / "out.partial")) is None
    import_checkpoint(str(source), str(output), quiet=True)  # run again
    assert find_checkpoint(str(output)).name == "release"
    assert not (tmp_path / "out.partial").exists()


def test_tool_says_it_in_one_line(source, quick_python):
    truncate(shards(source)[0], 1)
    tool = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
    output = str(source.parent / "out")
    command = [quick_python, str(tool), "import", "--hf", str(source), "--output", output]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
