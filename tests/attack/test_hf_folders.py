# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders damaged by seed: the right result, or an error that names the file.

And conversions that are killed: a whole folder or none, and the same command works afterwards.
``support/attack.py`` says what decides its size and its seed.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from support import hf_models as models
from support.attack import SEED, kills, rounds
from tqdm import tqdm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cpu_megatron")]

ROUNDS, KILLS = rounds(300), kills(20)
JUNK = [
    *(0, -1, 1e30, 10**12, 10**30, 10**400, 2.5, float("nan"), float("inf"), True, False, None),
    *("", "8", "../../x", "\0", [], [8], [[8]], {}, {"a": 8}, {"a": {"b": None}}),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A source in several shards, with tokenizer files and a licence."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("good")
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    models.make(folder / "one", "Llama 3.1's RoPE", **small)
    (folder / "one/tokenizer_config.json").write_text('{"model_max_length": 96}')
    (folder / "one/LICENSE").write_text("free")
    import_checkpoint(str(folder / "one"), str(folder / "base"), quiet=True)
    export_checkpoint(str(folder / "base"), str(folder / "hf"), shard_bytes=30_000, quiet=True)
    (folder / "one").rename(folder / "gone")
    return folder


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def any_shard(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def damage_config(rng, folder):
    edit_json(folder / "config.json", lambda c: c.update({rng.choice(sorted(c)): rng.choice(JUNK)}))


def damage_rope(rng, folder):
    def change(config):
        for key in ("rope_parameters", "rope_scaling"):
            if rng.random() < 0.8:
                config[key].update({rng.choice(sorted(config[key])): rng.choice(JUNK)})

    edit_json(folder / "config.json", change)


def damage_index(rng, folder):
    def change(index):
        kind = rng.randrange(4)
        names = index["weight_map"]
        if kind == 0:
            names[rng.choice(sorted(names))] = rng.choice([*JUNK, "../one/model.safetensors"])
        elif kind == 1:
            del names[rng.choice(sorted(names))]
        elif kind == 2:
            index["weight_map"] = rng.choice(JUNK)
        else:
            names[rng.choice(sorted(names))] = rng.choice(sorted(names.values()))

    edit_json(folder / "model.safetensors.index.json", change)


def damage_header(rng, folder):
    path = any_shard(rng, folder)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    kind = rng.randrange(6)
    if kind == 0:
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(JUNK)
    elif kind == 1:
        shift = rng.choice([-4, 4, 64])
        header[name]["data_offsets"] = [one + shift for one in header[name]["data_offsets"]]
    elif kind == 2:
        header[name]["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4])
    elif kind == 3:
        header[name]["dtype"] = rng.choice(["BF16", "I32", "F64", "F8_E4M3"])
    elif kind == 4:
        header[name]["shape"] = header[name]["shape"][::-1] or [1]
    else:
        del header[name]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def damage_bytes(rng, folder):
    """Flip bytes where no tensor is: the length, the header, a JSON file."""
    path = rng.choice([*folder.glob("*.json"), any_shard(rng, folder)])
    content = bytearray(path.read_bytes())
    most = len(content)
    if path.suffix == ".safetensors":
        most = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.randrange(1, 4)):
        content[rng.randrange(most)] = rng.randrange(256)
    path.write_bytes(content)


def damage_size(rng, folder):
    path = rng.choice([*folder.glob("*.json"), any_shard(rng, folder)])
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 5, rng.randrange(size), size - 1, size + 1, size + 4096]))


def damage_layers(rng, folder):
    """Tensors are gone from file and index alike, as a careless script leaves them."""
    from safetensors.torch import load_file, save_file

    path = any_shard(rng, folder)
    loaded = load_file(path)
    gone = rng.choice(sorted(loaded))
    del loaded[gone]
    save_file(loaded, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop(gone))


def damage_links(rng, folder):
    secret = folder.parent / "secret"
    secret.write_text("key")
    path = rng.choice([*folder.glob("*.json"), any_shard(rng, folder), folder / "LICENSE"])
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.symlink_to(secret)
    elif kind == 1:
        path.symlink_to(folder.parent / "nothing")
    elif kind == 2:
        path.symlink_to(path.name)
    else:
        path.mkdir()


DAMAGES = [
    *(damage_config, damage_rope, damage_index, damage_header, damage_bytes, damage_size),
    *(damage_layers, damage_links),
]


def attempt(work, folder):
    """Return what a command makes, or None where it ends in one line that says which file."""
    from megatron_cream.errors import UserError

    try:
        return work()
    except (UserError, OSError) as error:
        assert str(folder) in str(error), f"no file's name: {error!r}"
        assert "\n" not in str(error).strip() or len(str(error)) < 2000
        return None


def stored(folder):
    """The tensors by the safetensors library, as its index says where they are."""
    from safetensors import safe_open

    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in names.items():
        with safe_open(folder / file, "pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


def same(one, two):
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one
    )


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_damaged_folder(seed, good, tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.evaluation.hf_model import HuggingFaceModel
    from megatron_cream.planning.models import find_model

    rng = random.Random(f"{SEED} {seed}")
    folder = tmp_path / "model"
    shutil.copytree(good / "hf", folder)
    DAMAGES[seed % len(DAMAGES)](rng, folder)
    before = sorted(str(path) for path in folder.rglob("*"))
    out = tmp_path / "out"
    if attempt(lambda: import_checkpoint(str(folder), str(out), quiet=True), folder):
        export_checkpoint(str(out), str(tmp_path / "back"), quiet=True)
        assert same(models.tensors(tmp_path / "back"), stored(folder))
    else:
        assert not list(tmp_path.glob("out*"))  # an export of what was imported cannot fail
    loaded = attempt(lambda: HuggingFaceModel(str(folder), device="cpu"), folder)
    if loaded:
        # transformers reads all of the files that an index names, also what it does not name.
        state, names = loaded.module.state_dict(), models.tensors(folder)
        assert all(torch.equal(state[name], value.to(state[name])) for name, value in names.items())
        if loaded.module.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        assert state.keys() <= names.keys()
    attempt(lambda: find_model(str(folder)), folder)
    assert sorted(str(path) for path in folder.rglob("*")) == before
    assert not any((tmp_path / name).exists() for name in ("out/hf/secret", "nothing"))
    copied = [p for p in tmp_path.glob("out/hf/*") if p.read_bytes() == b"key"]
    assert not copied


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("task", ["import", "export"])
def test_killed_conversion(task, seed, good, tmp_path):
    """At a moment drawn from the time that a whole one takes."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    output = str(tmp_path / "out")

    def convert(output):
        torch.set_num_threads(1)  # a forked process has no other threads
        if task == "import":
            import_checkpoint(str(good / "hf"), output, quiet=True)
        else:
            export_checkpoint(str(good / "base"), output, shard_bytes=30_000, quiet=True)

    def alone(output):
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, and dies locked
        convert(output)

    start = time.monotonic()
    convert(str(tmp_path / "whole"))
    takes = time.monotonic() - start
    process = multiprocessing.get_context("fork").Process(target=alone, args=(output,))
    process.start()
    time.sleep(random.Random(f"{SEED} {task} {seed}").random() * takes * 1.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not Path(output).exists():
        convert(output)
    relative = {p.relative_to(output) for p in Path(output).rglob("*") if p.is_file()}
    whole = {
        p.relative_to(tmp_path / "whole"): p.stat().st_size
        for p in (tmp_path / "whole").rglob("*")
        if p.is_file()
    }
    assert relative - {Path(".megatron_cream.json")} == whole.keys()
    for name, size in whole.items():
        if name.suffix in (".safetensors", ".distcp", ".json"):
            assert (Path(output) / name).stat().st_size == size
    assert not list(tmp_path.glob("*.partial"))
