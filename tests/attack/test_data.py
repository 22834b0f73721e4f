# SPDX-License-Identifier: Apache-2.0
"""The data tools under attack: damaged input, changed datasets, kills, wrong command lines.

Each attempt ends in the right result or in one line and status 2; never in a traceback, a wait, a
lost file or a dataset that is wrong in silence.

    MEGATRON_CREAM_ATTACK_ROUNDS=2000 .venv/bin/python -m pytest -m slow tests/attack/test_data.py

``support/attack.py`` says what decides its size and its seed.
"""

import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.attack import SEED, kills, rounds
from support.commands import load_file

from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.storage import SUFFIXES
from megatron_cream.corpus.tokenizers import train_bpe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

ROOT = Path(__file__).parents[2]
ROUNDS, KILLS = rounds(40), kills(4)
RESERVED = ("0", "-1", "99999999999999999999", "1e3", "", "nan", "7", "２", "0x10")
TEXTS = ["alpha beta", "κόσμε 🎈", "a", "", "x" * 300, "the same again", "the same again"] * 4


def load(name):
    tool = load_file(ROOT / "tools" / f"{name}.py")
    return tool.main


@pytest.fixture(scope="module")
def tools():
    before = signal.getsignal(signal.SIGTERM)
    names = ("preprocess_data", "merge_datasets", "inspect_dataset", "render_chat")
    yield {name: load(name) for name in names}
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def attempt(tools, capsys):
    """Runs a tool here; returns its status and the line of its error."""

    def call(name, *argv):
        capsys.readouterr()
        try:
            status = tools[name]([str(word) for word in argv]) or 0
        except SystemExit as end:
            status = end.code
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err
        assert (status, len(said)) in ((0, 0), (2, 1)), (argv, status, err)
        assert not said or len(said[0]) > len("error: x"), argv
        return status, said[0] if said else ""

    return call


@pytest.fixture
def rng(request):
    return random.Random(f"{SEED} {request.node.name}")


def damaged(rng, data):
    """The bytes with some changed, lost, doubled, put in, or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(len(data) or 1), rng.randrange(6)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at : at + 8] = rng.choice((0, -1, 1 << 31, (1 << 63) - 1, 3)).to_bytes(
                8, "little", signed=True
            )
        else:
            del data[at:]
    return bytes(data)


def snapshot(folder, but=()):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not str(path.relative_to(folder)).startswith(tuple(but) or "\0")
    }


def written(name, folder, texts=TEXTS):
    """An input of ``texts`` in the format of its name."""
    path = folder / name
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith((".parquet", ".arrow")):
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"text": texts, "n": range(len(texts))})
        if name.endswith("parquet"):
            import pyarrow.parquet as pq

            pq.write_table(table, path, row_group_size=9)
        else:
            make = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
            with make(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
        return path
    if name.endswith(".zst"):
        data = pytest.importorskip("zstandard").compress(data)
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data)
    path.write_bytes("\n".join(texts).encode() if name.endswith("txt") else packed)
    return path


INPUTS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt", "a.parquet", "a.arrow")


@pytest.mark.parametrize("name", [*INPUTS, "stream.arrow"])
def test_damaged_input(attempt, rng, tmp_path, name):
    path, prefix = written(name, tmp_path), tmp_path / "out" / "data"
    whole = path.read_bytes()
    argv = ["--input", path, "--tokenizer-type", "ByteLevelTokenizer", "--output-prefix", prefix]
    assert attempt("preprocess_data", *argv)[0] == 0
    right = (tmp_path / "out" / "data.bin").read_bytes()
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path / "out")
        path.write_bytes(damaged(rng, whole))
        before = snapshot(tmp_path, ["out/"])
        how = rng.choice(((), ("--on-error", "skip"), ("--drop-duplicates",), ("--max-tokens", 9)))
        status, said = attempt("preprocess_data", *argv, *how)
        assert snapshot(tmp_path, ["out/"]) == before
        if status:
            assert str(path) in said
            assert not list((tmp_path / "out").glob("data.???"))
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            (tmp_path / "out").mkdir()
            continue
        assert attempt("inspect_dataset", prefix, "--check")[0] == 0
        if name.endswith((".gz", ".xz")) and path.read_bytes() != whole and not how:
            assert (tmp_path / "out" / "data.bin").read_bytes() == right


def dataset(folder, name, **changes):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = PreprocessConfig(
        (str(source),), "ByteLevelTokenizer", str(folder / name), append_eod=True, **changes
    )
    preprocess(config, progress=False)
    return folder / name


def change_note(rng, data):
    note = json.loads(data)
    key = rng.choice(sorted(note))
    value = rng.choice(
        (None, -1, 0, 1 << 70, "x", [], {}, [1], {"a": "b"}, True, 1.5, float("nan"))
    )
    if rng.random() < 0.2:
        del note[key]
    else:
        note[key] = value
    return json.dumps(note).encode()


def change_index(rng, data):
    """One number of the header, of the lengths, the pointers or the documents."""
    sequences = int.from_bytes(data[18:26], "little")
    places = [(9, 8), (17, 1), (18, 8), (26, 8)]
    places += [(34 + 4 * i, 4) for i in range(sequences)]
    places += [(at, 8) for at in range(34 + 4 * sequences, len(data) - 7, 8)]
    at, size = rng.choice(places)
    now = int.from_bytes(data[at : at + size], "little", signed=True)
    new = rng.choice((now + 1, now - 1, -now, 0, now * 2, (1 << (8 * size - 1)) - 1, now ^ 6))
    new = (new % (1 << (8 * size))).to_bytes(size, "little")
    return data[:at] + new + data[at + size :]


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize("noted", [True, False])
def test_changed_dataset(attempt, rng, tmp_path, noted):
    """What inspection calls sound merges and trains; what it refuses does neither."""
    split = {"max_tokens": 100} if rng.random() < 0.5 else {}
    prefix, other = dataset(tmp_path, "data", **split), dataset(tmp_path, "other")
    if not noted:
        prefix.with_suffix(".json").unlink()
    paths = [p for p in map(prefix.with_suffix, SUFFIXES) if p.exists()]
    whole = {path: path.read_bytes() for path in paths}
    for _ in range(ROUNDS * 4):
        for path in tmp_path.glob("merged*"):
            path.unlink()
        for path, data in whole.items():
            path.write_bytes(data)
        path = rng.choice(paths)
        kinds = {".idx": change_index, ".json": change_note}
        how = rng.choice((kinds.get(path.suffix, damaged), damaged))
        path.write_bytes(how(rng, whole[path]))
        before = snapshot(tmp_path)
        sound = attempt("inspect_dataset", prefix, "--check")[0] == 0
        attempt("inspect_dataset", prefix, "--seq-length", 4, "--target-length", 9)
        attempt("inspect_dataset", prefix, "--document", rng.randrange(-1, 12))
        merge = ["--input", prefix, other, "--output-prefix", tmp_path / "merged"]
        merged = attempt("merge_datasets", *merge)[0] == 0
        if merged:
            assert attempt("inspect_dataset", tmp_path / "merged", "--check")[0] == 0
            assert sound
        assert snapshot(tmp_path, ["merged"]) == before
        if sound and path.suffix == ".idx":
            # Two dtypes of one size have the same ids below the sign; where documents begin among
            # the sequences (the last numbers) nothing else says.
            end = 34 + 12 * int.from_bytes(whole[path][18:26], "little")
            assert path.read_bytes()[18:end] == whole[path][18:end]
        assert draws(prefix) in ({True} if sound else {True, False})


def draws(prefix):
    """Whether a run starts on a dataset; every sample it then reads is of ids that are there."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_cream.config import ExtensionConfig
    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig
    from megatron_cream.errors import UserError

    extension = ExtensionConfig(
        train_length=8, target_length=32, original_length=8, position_strategy="pose"
    )
    config = SpanDatasetConfig(
        random_seed=7,
        sequence_length=8,
        blend=([str(prefix)], None),
        split="100,0,0",
        extension=extension,
    )
    try:
        train = BlendedMegatronDatasetBuilder(SpanDataset, [30, 0, 0], lambda: True, config).build()
        for index in range(30):
            assert len(train[0][index]["tokens"]) == 8
    except (UserError, FileNotFoundError):
        return False
    return True


KILLED = ("a.jsonl", "a.jsonl.gz", "a.parquet")  # workers of the last are fresh interpreters


@pytest.mark.parametrize("name", KILLED)
def test_kills(rng, tmp_path, name):
    """Killed again and again, in its clean-up too, or a worker alone: the same bytes in the end."""
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(200)]
    path = written(name, tmp_path, [" ".join(rng.choices(words, k=30)) for _ in range(3000)])
    train_bpe([" ".join(words)], 300, tmp_path / "tokenizer")
    argv = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(path)]
    argv += ["--tokenizer-type", "HuggingFaceTokenizer", "--drop-duplicates", "--append-eod"]
    argv += ["--tokenizer-model", str(tmp_path / "tokenizer"), "--part-bytes", "20000"]
    whole = subprocess.run(
        [*argv, "--output-prefix", str(tmp_path / "whole")], capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    prefix = tmp_path / "out" / "data"
    command = [*argv, "--output-prefix", str(prefix), "--workers"]
    for _ in range(KILLS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for _ in range(rng.randrange(1, 5)):
            killed_once(rng, [*command, str(rng.choice((1, 2, 3)))], prefix)
        done = subprocess.run([*command, "2"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for suffix in (".bin", ".idx", ".json"):
            made = Path(f"{prefix}{suffix}").read_bytes()
            assert made == Path(f"{tmp_path}/whole{suffix}").read_bytes()
        assert sorted(p.suffix for p in prefix.parent.iterdir()) == [".bin", ".idx", ".json"]


def killed_once(rng, command, prefix):
    """Kill the tool, or one of its workers, at a moment of one of several kinds."""
    kind, parts = rng.randrange(4), Path(f"{prefix}.parts")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    end = time.monotonic() + (60 if kind else rng.uniform(0, 2.5))
    while process.poll() is None and time.monotonic() < end:
        finished = len(list(parts.glob("*-*.json")))
        if kind in (1, 3) and finished > rng.randrange(1, 40):
            break
        if kind == 2 and prefix.with_name("data.idx").exists():  # its clean-up
            break
        time.sleep(rng.uniform(0, 0.002))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if kind == 3 and process.poll() is None else []
    victim = int(rng.choice(workers)) if workers else process.pid
    if process.poll() is None:
        os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 2, -signal.SIGKILL), err.decode()
    if process.returncode == 2:
        last = err.decode().splitlines()[-1]
        assert last.startswith("error: --workers: a worker died"), err.decode()


def test_wrong_command_lines(attempt, rng, tmp_path, monkeypatch):
    """Any values in any flags; nothing that is there is lost."""
    monkeypatch.chdir(tmp_path)
    written("a.jsonl", tmp_path)
    written("a.txt", tmp_path)
    dataset(tmp_path, "data")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("text")
    (tmp_path / "folder.parts").mkdir()
    (tmp_path / "folder.parts" / "mine.txt").write_text("mine")
    (tmp_path / "link.parts").symlink_to(tmp_path / "folder")
    train_bpe(TEXTS, 300, tmp_path / "tokenizer")
    paths = ["", ".", "..", "/", "a.jsonl", "a.txt", "a", "data", "data.idx", "data.json", "folder"]
    paths += ["folder/", "folder.parts", "link", "link.parts", "missing", "missing/x", "/dev/null"]
    paths += ["tokenizer", "tokenizer/tokenizer.json", "x" * 300, "a.jsonl/x", "*", "**/*.txt", "é"]
    numbers = ("--min-tokens", "--max-tokens", "--seq-length", "--target-length", "--verify")
    numbers += ("--part-bytes", "--shard", "--workers", "--tokens", "--document", "--vocab-size")
    types = ("ByteLevelTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "Other", "")
    mine = snapshot(tmp_path)
    for _ in range(ROUNDS * 4):
        name = rng.choice(("preprocess_data", "merge_datasets", "inspect_dataset", "render_chat"))
        argv = ["--output" if name == "render_chat" else "--output-prefix", rng.choice(paths)]
        argv = [rng.choice(paths)] if name == "inspect_dataset" else argv
        if name != "inspect_dataset":
            argv += ["--input", *rng.choices(paths, k=rng.choice((1, 1, 2)))]
        if name == "preprocess_data" or rng.random() < 0.3:
            argv += ["--tokenizer-type", rng.choice(types)]
        if rng.random() < 0.5:
            argv += ["--tokenizer-model", rng.choice(paths)]
        for flag in rng.sample(numbers, k=rng.randrange(3)):
            argv += [flag, rng.choice((*RESERVED, "0/2", "2/2", "0/0", "1/99999999999"))]
        argv += rng.sample(("--append-eod", "--prepend-bos", "--check", "--restart"), k=1)
        argv = [word for word in argv if rng.random() > 0.02]
        attempt(name, *argv)
        assert mine.items() <= snapshot(tmp_path).items(), argv
        for path in tmp_path.rglob("*"):
            if path.is_file() and str(path.relative_to(tmp_path)) not in mine:
                path.unlink()


def test_damaged_tokenizers(attempt, rng, tmp_path):
    path, prefix = written("a.jsonl", tmp_path), tmp_path / "out" / "data"
    train_bpe(TEXTS, 300, tmp_path / "tokenizer")
    argv = ["--input", path, "--tokenizer-type", "HuggingFaceTokenizer", "--output-prefix", prefix]
    argv += ["--tokenizer-model", tmp_path / "tokenizer", "--append-eod"]
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        victim = tmp_path / "tokenizer" / rng.choice(("tokenizer.json", "tokenizer_config.json"))
        whole = victim.read_bytes()
        victim.write_bytes(rng.choice((damaged(rng, whole), b"", whole[: len(whole) // 2], b"[]")))
        if attempt("preprocess_data", *argv)[0] == 0:
            assert attempt("inspect_dataset", prefix, "--check")[0] == 0
        victim.write_bytes(whole)


def test_damaged_shards(attempt, rng, tmp_path):
    """Shards that do not merge to the dataset of the whole job do not merge."""
    whole = dataset(tmp_path, "whole", drop_duplicates=True)
    for i in range(3):
        dataset(tmp_path, "whole", drop_duplicates=True, shard=(i, 3), part_bytes=200)
    names = [tmp_path / f"whole-0000{i}-of-00003" for i in range(3)]
    paths = [p for name in names for p in map(name.with_suffix, SUFFIXES) if p.exists()]
    content = {path: path.read_bytes() for path in paths}
    for _ in range(ROUNDS * 2):
        for path in tmp_path.glob("merged*"):
            path.unlink()
        victim = rng.choice(paths)
        if rng.random() < 0.2:
            victim.unlink()
        else:
            victim.write_bytes(damaged(rng, content[victim]))
        argv = ["--input", *names, "--output-prefix", tmp_path / "merged"]
        if attempt("merge_datasets", *argv)[0] == 0:
            assert attempt("inspect_dataset", tmp_path / "merged", "--check")[0] == 0
            if victim.suffix == ".idx":
                ours = np.fromfile(f"{tmp_path}/merged.bin", np.uint16)
                assert np.array_equal(ours, np.fromfile(f"{whole}.bin", np.uint16))
        victim.write_bytes(content[victim])
