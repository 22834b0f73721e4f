# SPDX-License-Identifier: Apache-2.0
"""A run writes each case at once, continues where it was killed, and says what is wrong."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from support.arguments import arguments
from support.commands import exit_status, load_file
from support.evaluation import run

from megatron_cream.evaluation.evaluate import HELP
from megatron_cream.evaluation.prompts import HaystackCases
from megatron_cream.evaluation.result_files import CASE_RECORDS, read_result
from megatron_cream.evaluation.results_page import compare
from megatron_cream.evaluation.scoring import take_within
from megatron_cream.evaluation.store import ResultStore
from megatron_cream.options import parse_length

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    """tools/evaluate.py as a module."""
    return load_file(ROOT / "tools" / "evaluate.py")


@pytest.fixture(scope="module")
def finished(small_hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lines"
    lines = arguments(tasks=["longchat-lines"], hf=small_hf, lengths=[384, 768], output=str(folder))
    return folder, run(lines)


def asked(small_hf, folder, **changes):
    settings = {"tasks": ["longchat-lines"], "hf": small_hf, "lengths": [384, 768]}
    return arguments(**(settings | {"output": str(folder)} | changes))


def records(folder):
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def test_files_of_a_run(finished):
    folder, printed = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"settings.json", "cases.jsonl", "result.json", "table.md", "picture.png"}
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text().strip() == printed
    result = read_result(folder)
    assert [row["cases"] for row in result["lengths"]] == [6, 6]
    assert "| 768\\* |" in printed and "longer than the model's window" in printed
    for row in result["lengths"]:
        assert 0 <= row["hit_low"] <= row["hit"] <= row["hit_high"] <= 1


def test_killed_run_continues(finished, small_hf, tmp_path, monkeypatch):
    from megatron_cream.evaluation import hf_model

    whole = finished[0]
    lines = (whole / "cases.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    (tmp_path / "cases.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    scored = []
    own = hf_model.HuggingFaceModel.hidden
    monkeypatch.setattr(
        hf_model.HuggingFaceModel, "hidden", lambda m, one: scored.append(one) or own(m, one)
    )
    run(asked(small_hf, tmp_path))
    assert scored and all(one.tokens.shape[1] >= 768 for one in scored)  # not the finished 384
    assert records(tmp_path) == records(whole)
    assert (tmp_path / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    scored.clear()
    run(asked(small_hf, tmp_path))
    assert scored == []


def test_other_settings_in_the_same_folder(finished, small_hf):
    with pytest.raises(ValueError, match=r"--output is .*\(seeds 2 != 3\)"):
        run(asked(small_hf, finished[0], seeds=3))
    with pytest.raises(ValueError, match=r"dtype float32 != bfloat16"):
        run(asked(small_hf, finished[0], dtype="bfloat16"))


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new folder, or that of a run"):
        ResultStore(tmp_path, {"task": "needle"}, CASE_RECORDS)


def test_compare(finished, small_hf, tmp_path):
    first = finished[0]
    run(asked(small_hf, tmp_path / "second", name="second", dtype="bfloat16"))
    table = compare([str(first), str(tmp_path / "second")], str(tmp_path / "both"))
    assert len(table.splitlines()) == 6
    assert "| second |" in table
    assert (tmp_path / "both" / "picture.png").stat().st_size > 10_000
    run(asked(small_hf, tmp_path / "third", cases=2))
    with pytest.raises(ValueError, match="third has cases 2: .* has 3"):
        compare([str(first), str(tmp_path / "third")], None)
    with pytest.raises(FileNotFoundError, match="must be the --output of a finished run"):
        compare([str(tmp_path)], None)


def test_fewer_seeds_at_longer_lengths(small_hf, tmp_path):
    several = {"tasks": ["passkey", "common-words"], "lengths": [2200, 3800], "name": "model"}
    printed = run(asked(small_hf, tmp_path, **several, cases=2, seeds=3, most_tokens=13200))
    counts = {
        task: [(row["cases"], row["haystacks"]) for row in read_result(tmp_path / task)["lengths"]]
        for task in several["tasks"]
    }
    # Both depths of a seed are kept together; a case of common words is a haystack of its own.
    assert counts == {"passkey": [(6, 6), (2, 2)], "common-words": [(6, 6), (3, 3)]}
    suite = (tmp_path / "table.md").read_text()
    note = "fewer cases at a length whose haystacks would exceed 13200 tokens"
    assert printed.endswith(suite.strip()) and printed.count(note) == 3
    rows = {line.split(" | ")[0]: line for line in suite.splitlines()}
    assert rows["| passkey"].endswith("| 6, 2 |") and rows["| common-words"].endswith("| 6, 3 |")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_other_most_tokens_in_the_same_folder(finished, small_hf):
    with pytest.raises(ValueError, match=r"\(most_tokens None != 900\)"):
        run(asked(small_hf, finished[0], most_tokens=900))


@pytest.mark.parametrize("most, taken", [(None, 5), (100, 2), (99, 1), (1, 1), (150, 3)])
def test_affordable_haystacks(most, taken):
    made = []

    def groups():
        for number in range(5):
            made.append(number)
            yield [HaystackCases([], [], 25, number)] * 2

    assert len(take_within(groups(), most)) == 2 * taken
    assert len(made) <= taken + 1  # what will not be scored is not made


def test_threads_of_a_shared_machine_wait_asleep(tool, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert exit_status(tool.main, ["compare", "nowhere"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert exit_status(tool.main, ["compare", "nowhere"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize("word", ["4096", "4K", "4k"])
def test_lengths(word):
    assert parse_length(word) == 4096


BAD = {
    "exactly one of them": ["needle", "--lengths", "4K"],
    "--hf is nowhere: it must be a folder": ["needle", "--hf", "nowhere", "--lengths", "4K"],
    "--lengths has 0: it must be at least 1": ["needle", "--hf", "HF", "--lengths", "0"],
    "--most-tokens has 0: it must be at least 1": [
        *("needle", "--hf", "HF", "--lengths", "900", "--most-tokens", "0"),
    ],
    "--most-tokens is 900 with --cases-file: it must be left out": [
        *("longchat-lines", "--hf", "HF", "--lengths", "900", "--most-tokens", "900"),
        *("--cases-file", "cases.jsonl"),
    ],
    "--lengths has 64: needle needs at least": ["needle", "--hf", "HF", "--lengths", "64"],
    "--data is missing": ["perplexity", "--hf", "HF", "--lengths", "64"],
    "--data is EMPTY": ["perplexity", "--hf", "HF", "--lengths", "64", "--data", "EMPTY"],
    "--rope-factor is not given": [
        *("needle", "--hf", "HF", "--lengths", "900", "--rope-interpolation", "yarn"),
    ],
    "RUN is nowhere": ["compare", "nowhere"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(tool, small_hf, tmp_path, capsys, message):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    words = [{"HF": small_hf, "EMPTY": str(empty)}.get(word, word) for word in BAD[message]]
    assert exit_status(tool.main, words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message.replace("EMPTY", str(empty)) in error


def test_tokenizer_of_another_model(small_hf, tmp_path):
    from megatron_cream.corpus.tokenizers import train_bpe

    train_bpe([" ".join(f"w{i}x{i * 7919}" for i in range(900))], 500, tmp_path)
    wrong = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    with pytest.raises(ValueError, match="has 500 tokens, .* has 384: it must be the tokenizer"):
        run(asked(small_hf, None, output=None, **wrong))


def test_a_trained_checkpoint_names_its_tokenizer(small_hf, tmp_path, monkeypatch):
    from megatron_cream.evaluation import prompts

    words = arguments(checkpoint=str(tmp_path))
    saved = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=small_hf)
    (tmp_path / "metadata.json").write_text("{}")
    monkeypatch.setattr(prompts, "read_saved_arguments", lambda path: saved)
    tokenizer, source = prompts.open_tokenizer(words)
    assert source == small_hf
    assert tokenizer.vocab_size == prompts.open_tokenizer(arguments(hf=small_hf))[0].vocab_size
    saved.tokenizer_model = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="--tokenizer-type is not given"):
        prompts.open_tokenizer(words)


def test_data_of_another_tokenizer(small_hf, tmp_path):
    from support.runs import write_dataset

    data = write_dataset(tmp_path / "text", [300] * 3, vocabulary=900)
    with pytest.raises(ValueError, match="--data is .* the model's vocabulary has 384"):
        run(arguments(hf=small_hf, data=data, documents=3))


def test_longer_than_the_window_is_said(tool, small_hf, capsys):
    command = ["passkey", "--hf", small_hf, "--lengths", "640", "--seeds", "1", "--cases", "1"]
    assert tool.main(command) == 0
    captured = capsys.readouterr()
    assert "has a window of 512 tokens" in captured.err
    assert "| 640\\* |" in captured.out


def test_help_names_every_task(tool, capsys):
    from megatron_cream.evaluation.evaluation_tasks import TASKS

    assert set(HELP) == {*TASKS, "perplexity", "longppl", "ruler", "all"}
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    printed = capsys.readouterr().out
    assert all(task in printed for task in (*TASKS, "perplexity", "compare"))
    assert "evaluate_tool" not in sys.modules
