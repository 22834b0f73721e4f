# SPDX-License-Identifier: Apache-2.0
"""Evaluation under attack: damaged files, wrong command lines, two at once, kills.

Each input gives the right result, or a UserError or OSError that names the flag or the file.
``support/attack.py`` says what decides its size and its seed.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.arguments import arguments
from support.attack import SEED, kills, rounds
from support.commands import exit_status, load_file
from support.evaluation import run, write_small_hf
from support.runs import write_dataset

from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import read_cases
from megatron_cream.evaluation.results_page import compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
ROUNDS, KILLS = rounds(150), kills(8)
JUNK = [
    *(None, True, -1, 0, 1, 2**31, 10**40, -0.5, 0.5, 1e400, float("nan"), "", "x", "0" * 200),
    *([], [1], {}, {"a": 1}, [[]], [None], ["a", "b"], "\x00", "../..", "٤"),
]


@pytest.fixture(scope="session")
def small_hf(tmp_path_factory):
    return write_small_hf(tmp_path_factory.mktemp("hf"))


def drawing(part):
    return random.Random(f"{SEED} {part}")


def load(name):
    return load_file(ROOT / "tools" / f"{name}.py")


def flipped(data, rng):
    """Some bytes are other ones."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 16])):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def lines(data, rng):
    """Lines are left out, doubled, moved, joined."""
    parts = data.splitlines(keepends=True) or [b""]
    at, to = rng.randrange(len(parts)), rng.randrange(len(parts))
    how = rng.randrange(4)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(to, parts[at])
    elif how == 2:
        parts[at], parts[to] = parts[to], parts[at]
    else:
        parts[at] = parts[at].rstrip(b"\n")
    return b"".join(parts)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    for key, part in parts.items() if isinstance(parts, dict) else ():
        yield from places(part, (*path, key))


def changed(data, rng):
    """A value anywhere in one of the JSON values of a file is junk, or gone."""
    whole = data.strip().startswith(b"{\n") or data.strip().startswith(b"[\n")
    texts = [data] if whole else data.splitlines()
    at = rng.randrange(len(texts))
    value = json.loads(texts[at])
    *way, last = rng.choice(list(places(value))) or (None,)
    if last is None:
        value = rng.choice(JUNK)
    else:
        inside = value
        for key in way:
            inside = inside[key]
        if rng.random() < 0.3:
            del inside[last]
        else:
            inside[last] = rng.choice(JUNK)
    texts[at] = json.dumps(value).encode()
    return b"\n".join(texts) + b"\n"


DAMAGES = (flipped, cut, lines, changed)


def attack(seed, data):
    rng = drawing(seed)
    return rng.choice(DAMAGES)(data, rng)


def survives(call, *names):
    """Return what ``call`` returns; None where it ends in an error that has one of ``names``."""
    try:
        return call()
    except (UserError, OSError) as error:
        text = str(error)
        assert any(str(name) in text for name in names), f"{type(error)}: {text}"
        return None


def damage_a_file(seed, folder, names):
    rng = drawing(seed)
    path = folder / rng.choice(names)
    path.write_bytes(attack(seed, path.read_bytes()))
    return path


@pytest.fixture(scope="module")
def finished(small_hf, tmp_path_factory):
    """A finished run of each kind of record, and how it was asked for."""
    root = tmp_path_factory.mktemp("finished")
    text = root / "text.txt"
    text.write_text("What is the pass key? The pass key is 12345. " * 60)
    asked = {
        "cases": {"tasks": ["longchat-lines"], "hf": small_hf, "lengths": [384], "name": "m"},
        "documents": {"hf": small_hf, "data": str(text), "documents": 1, "name": "m"},
    }
    for kind, words in asked.items():
        run(arguments(output=str(root / kind), **words))
    return root, asked


@pytest.mark.parametrize("kind", ["cases", "documents"])
def test_damaged_folder_of_a_run(finished, tmp_path, kind):
    root, asked = finished
    right = (root / kind / "result.json").read_bytes()
    names = ["settings.json", "cases.jsonl", "cases.jsonl", "result.json"]
    wrong, refused = [], 0
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        shutil.copytree(root / kind, folder)
        path = damage_a_file(seed, folder, names)
        words = arguments(output=str(folder), **asked[kind])
        if survives(lambda w=words: run(w), f"--output is {folder}") is None:
            refused += 1
        elif (folder / "result.json").read_bytes() != right:
            wrong.append((seed, path.name))
        shutil.rmtree(folder)
    assert wrong == [] and 0 < refused < ROUNDS


@pytest.mark.parametrize("kind", ["cases", "documents"])
def test_damaged_results_are_compared(finished, tmp_path, kind):
    root, _ = finished
    ended = 0
    for seed in range(3 * ROUNDS):
        folder = tmp_path / "run"
        shutil.copytree(root / kind, folder)
        path = damage_a_file(seed, folder, ["result.json"])
        runs = [str(folder), str(root / kind)][:: drawing(seed).choice([1, -1])]
        drawn = str(tmp_path / "both") if seed % 10 == 0 else None
        ended += survives(lambda r=runs, d=drawn: compare(r, d), "RUN", path) is None
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "both", ignore_errors=True)
    assert ended > ROUNDS / 3


LINE = "line amber-oak: REGISTER_CONTENT is <67890>"
PUBLISHED = {
    "longchat-lines": {
        "random_idx": ["amber-oak", 0], "expected_number": 67890, "num_lines": 1,
        "correct_line": LINE, "prompt": f"A record.\n{LINE}\nWhat is the number?",
    },
    "kv-retrieval": {
        "ordered_kv_records": [["a-1", "b-2"], ["c-3", "d-4"], ["e-5", "f-6"]],
        "key": "c-3", "value": "d-4",
    },
}  # fmt: skip


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_damaged_files_of_cases(small_hf, tmp_path, task, suffix, monkeypatch):
    import gzip
    import lzma

    from megatron_cream.evaluation import evaluate as module

    monkeypatch.setattr(module, "open_model", lambda args: pytest.skip.Exception("reached"))
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(suffix).suffix, bytes)
    plain = "".join(json.dumps(PUBLISHED[task]) + "\n" for _ in range(3)).encode()
    path = tmp_path / f"cases{suffix}"
    asked = {"tasks": [task], "hf": small_hf, "lengths": None, "cases_file": str(path)}
    for seed in range(ROUNDS):
        outside = seed % 3 == 0
        path.write_bytes(attack_plain(seed, pack(plain)) if outside else pack(attack(seed, plain)))
        survives(lambda: prepared(asked), "--cases-file is")
        survives(lambda: read_cases(str(path)), "--cases-file is")


def attack_plain(seed, data):
    rng = drawing(seed)
    return rng.choice((flipped, cut))(data, rng)


def prepared(asked):
    """All of a run up to the model."""
    from megatron_cream.evaluation.prompts import open_prompt
    from megatron_cream.evaluation.scoring import make_haystacks

    args = arguments(**asked)
    args.validate()
    return make_haystacks(args, open_prompt(args), args.tasks[0])


def data_files(folder):
    """Data of every kind that --data takes: what is given, and the files to damage."""
    import gzip

    text = "What is the pass key? The pass key is 12345. " * 40
    jsonl = "".join(json.dumps({"text": text}) + "\n" for _ in range(4)).encode()
    (folder / "text.txt").write_text(text)
    (folder / "text.jsonl").write_bytes(jsonl)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(jsonl))
    prefix = write_dataset(folder / "dataset", [300] * 4, vocabulary=384)
    yield str(folder / "text.txt"), [folder / "text.txt"]
    yield str(folder / "text.jsonl"), [folder / "text.jsonl"]
    yield str(folder / "text.jsonl.gz"), [folder / "text.jsonl.gz"]
    yield prefix, [Path(f"{prefix}.idx"), Path(f"{prefix}.idx"), Path(f"{prefix}.bin")]


def test_damaged_data(small_hf, tmp_path):
    from megatron_cream.evaluation.evaluate import open_model
    from megatron_cream.evaluation.perplexity import open_documents

    model = open_model(arguments(hf=small_hf))
    for data, files in data_files(tmp_path):
        whole = {path: path.read_bytes() for path in files}
        asked = arguments(hf=small_hf, data=data, documents=2)
        for seed in range(ROUNDS):
            rng = drawing(seed)
            path = rng.choice(files)
            path.write_bytes(attack_plain(seed, whole[path]))
            found = survives(lambda a=asked: open_documents(a, model), data)
            if found is not None:
                assert [len(document) for document in found] == [193, 193]
                assert all(d.min() >= 0 and d.max() < 384 for d in found)
            path.write_bytes(whole[path])


WORDS = [
    *("", "0", "-1", "1", "9" * 20, "nan", "inf", "-inf", "1e30", "1e-30", "x", "0x10", "4K", "4k"),
    *("none", "[]", "{}", "a=b", "..", "/dev/null", "/proc/self/mem", "nowhere", "٤", "--", "1.5"),
]

BASES = {
    "evaluate": [
        ["needle", "--hf", "HF", "--lengths", "600", "--cases", "1", "--seeds", "1"],
        ["perplexity", "--hf", "HF", "--lengths", "96", "--data", "TEXT", "--documents", "1"],
        ["all", "--hf", "HF", "--lengths", "600"],
        ["compare", "nowhere"],
        ["longchat-lines", "--hf", "HF", "--cases-file", "TEXT"],
    ],
    "plan": [["llama-2-7b", "--gpus", "8", "--target-length", "32768"]],
    "plot_positions": [
        ["--train-length", "64", "--target-length", "256", "--strategy", name, "--samples", "9"]
        for name in ("cream", "pose", "randpos", "full")
    ],
}


def flags_of(tool):
    """Every flag of a tool."""
    import argparse

    seen = []
    own = argparse.ArgumentParser.__init__

    def keep(parser, *args, **options):
        own(parser, *args, **options)
        seen.append(parser)

    argparse.ArgumentParser.__init__ = keep
    try:
        exit_status(tool.main, ["--help"])
    finally:
        argparse.ArgumentParser.__init__ = own
    found = {a.option_strings[0] for parser in seen for a in parser._actions if a.option_strings}
    return sorted(found - {"-h", "--check", "--cpu"})


def command_lines(tool, name, fill):
    """Each flag with each word, beside a base that is right, then some words at random."""
    rng = drawing("command lines")
    flags = flags_of(tool)
    for flag, word in itertools.product(flags, WORDS):
        yield [*rng.choice(BASES[name]), flag, word]
    for _ in range(2 * ROUNDS):
        base = list(rng.choice(BASES[name]))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(base) + 1)
            base[at : at + rng.randrange(2)] = rng.choice([[], [rng.choice(WORDS)], [
                rng.choice(flags), rng.choice(WORDS)
            ]])  # fmt: skip
        yield base


@pytest.mark.parametrize("name", BASES)
def test_wrong_command_lines(small_hf, tmp_path, monkeypatch, capsys, name):
    from megatron_cream.evaluation import evaluate as module

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("What is the pass key? " * 200)
    tool = load(name)
    fill = {"HF": small_hf, "TEXT": "text.txt"}
    if name == "evaluate":  # what a model makes of it is another matter: it is loaded once
        loaded = module.open_model(arguments(hf=small_hf))
        own = module.open_model
        plain = ("rope_interpolation", "rope_factor", "rope_theta", "rope_options", "dtype")

        def opened(args, *longest):
            other = any(getattr(args, key) for key in plain) or args.hf != small_hf
            return own(args, *longest) if other else loaded

        monkeypatch.setattr(module, "open_model", opened)
    ended = {0: 0, 2: 0}
    for words in command_lines(tool, name, fill):
        words = [fill.get(word, word) for word in words]
        start = time.monotonic()
        try:
            status = exit_status(tool.main, words)
        except BaseException as error:
            raise AssertionError(f"{words}: {type(error).__name__} {error}") from error
        seconds = time.monotonic() - start
        captured = capsys.readouterr()
        assert status in ended, words
        assert seconds < 60, (words, seconds)
        ended[status] += 1
        if status == 2:
            assert captured.err.splitlines()[-1].startswith("error: "), (words, captured.err)
            assert "Traceback" not in captured.err
    assert all(ended.values())


def test_two_at_once_in_one_process(small_hf, tmp_path, finished):
    root, asked = finished
    right = (root / "cases" / "result.json").read_bytes()
    for attempt in range(10):
        folder, errors = tmp_path / str(attempt), []

        def evaluate(folder=folder, errors=errors):
            try:
                run(arguments(output=str(folder), **asked["cases"]))
            except BlockingIOError as refusal:
                errors.append(str(refusal))

        threads = [threading.Thread(target=evaluate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(f"--output is {folder}" in error for error in errors)
        assert (folder / "result.json").read_bytes() == right


def command(small_hf, folder):
    tool = [sys.executable, str(ROOT / "tools" / "evaluate.py")]
    words = ["longchat-lines", "--hf", small_hf, "--name", "m", "--lengths", "384", "500", "640"]
    return [*tool, *words, "--batch-tokens", "400", "--seeds", "4", "--output", str(folder)]


def test_two_processes_at_once_and_kills(small_hf, tmp_path):
    """Three processes start together again and again, are killed, and one result comes out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}
    subprocess.run(command(small_hf, tmp_path / "right"), check=True, **quiet)
    rng, seen = drawing("kills"), set()
    for _ in range(KILLS):
        both = [subprocess.Popen(command(small_hf, tmp_path / "run"), **quiet) for _ in range(2)]
        cases, wait = tmp_path / "run" / "cases.jsonl", rng.random() * 0.2
        while not cases.exists() and any(one.poll() is None for one in both):
            time.sleep(0.01)
        time.sleep(wait)
        for one in both:
            one.send_signal(signal.SIGKILL)
        for one in both:
            error = one.communicate()[1].decode()
            seen.add(one.returncode)
            assert one.returncode in (0, 2, -signal.SIGKILL), error
            assert one.returncode != 2 or "another process writes its results there" in error
    subprocess.run(command(small_hf, tmp_path / "run"), check=True, **quiet)
    for name in ("result.json", "table.md"):
        found, right = (tmp_path / run / name for run in ("run", "right"))
        assert found.read_bytes() == right.read_bytes()
    records = (tmp_path / "run" / "cases.jsonl").read_text().splitlines()
    assert len(records) == len(set(records)) == 60
    assert -signal.SIGKILL in seen


def test_no_damage_is_a_right_result(finished):
    """What the attacks compare with is what the seeds and the model decide."""
    root, _ = finished
    records = [json.loads(line) for line in (root / "cases" / "cases.jsonl").open()]
    result = json.loads((root / "cases" / "result.json").read_text())
    assert np.mean([record["hit"] for record in records]) == result["lengths"][0]["hit"]
