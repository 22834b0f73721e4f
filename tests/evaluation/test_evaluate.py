# SPDX-License-Identifier: Apache-2.0
"""What a command line lacks is said in one line, before a model is loaded."""

import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.arguments import arguments
from support.commands import exit_status, load_file
from support.evaluation import run

from megatron_cream.checkpoint import hf_folder
from megatron_cream.evaluation import evaluate, prompts

ROOT = Path(__file__).parents[2]
LINE = "line amber-oak: REGISTER_CONTENT is <67890>"


def load(name):
    return load_file(ROOT / "tools" / f"{name}.py")


@pytest.fixture(scope="module")
def tool():
    """tools/evaluate.py as a module."""
    return load("evaluate")


@pytest.fixture
def unloaded(monkeypatch):
    """No model can be loaded: what is refused must be refused before."""
    from megatron_cream.evaluation import hf_model

    def fail(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(evaluate, "open_model", fail)
    monkeypatch.setattr(hf_model, "_load", fail)


NUMBERS = {
    "--lengths has 0": {"lengths": [0]},
    "--lengths has 1000000000": {"lengths": [1_000_000_000]},
    "--lengths is missing": {"lengths": None},
    "--cases has 0": {"cases": 0},
    "--cases has 1000000000": {"cases": 10**9},
    "--seeds has -1": {"seeds": -1},
    "--first-seed has -1": {"first_seed": -1},
    "--documents has 0": {"documents": 0},
    "--shots has -1": {"shots": -1},
    "--batch-tokens has 0": {"batch_tokens": 0},
    "--stride has 0": {"stride": 0},
    "--document-tokens has -3": {"document_tokens": -3},
    "--most-tokens has 0": {"most_tokens": 0},
    "--tensor-model-parallel-size has 0": {"tensor_model_parallel_size": 0},
    "--pipeline-model-parallel-size has -2": {"pipeline_model_parallel_size": -2},
    "--context-parallel-size has 0": {"context_parallel_size": 0},
    "--hf is empty": {"hf": ""},
    "--data is empty": {"data": ""},
    "--output is empty": {"output": ""},
    "--checkpoint is nowhere: it must hold": {"hf": None, "checkpoint": "nowhere"},
    "--checkpoint or --hf: exactly one": {"checkpoint": "nowhere"},
}


@pytest.mark.parametrize("message", NUMBERS)
def test_values_out_of_range(small_hf, message):
    asked = {"tasks": ["needle"], "hf": small_hf, "lengths": [600], **NUMBERS[message]}
    with pytest.raises((ValueError, OSError), match=message):
        arguments(**asked).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 97}, "--stride is 97: it must be at most the shortest of --lengths, 96"),
        ({"document_tokens": 200}, "--document-tokens is 200: it must be more than .* 200"),
    ],
)
def test_windows_that_do_not_fit(small_hf, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(hf=small_hf, data="text", lengths=[96, 200], **changes).validate()


@pytest.mark.parametrize("word", ["4Q", "-4", "4.5", "", "9" * 20, "٤"])
def test_lengths_that_are_none(tool, capsys, word):
    assert exit_status(tool.main, ["needle", "--hf", "x", "--lengths", word]) == 2
    assert capsys.readouterr().err.startswith("error: argument --lengths: ")


def test_all_tasks_are_checked_before_the_first(small_hf, tmp_path, unloaded):
    from megatron_cream.evaluation.evaluation_tasks import TASKS

    asked = {"tasks": list(TASKS), "hf": small_hf, "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"--lengths has 900: [a-z-]+ needs at least"):
        run(arguments(lengths=[900, 4500], **asked))
    assert not (tmp_path / "run").exists()


def test_more_is_asked_of_longer_common_words(small_hf, unloaded):
    """A length of 4096 has more words in it than one of 4095."""
    asked = {"tasks": ["common-words"], "hf": small_hf, "cases": 1, "seeds": 1}
    with pytest.raises(AssertionError, match="a model is loaded"):
        run(arguments(lengths=[2500], **asked))
    with pytest.raises(ValueError, match="--lengths has 4096: common-words needs at least"):
        run(arguments(lengths=[2500, 4096], **asked))


def test_a_record_that_has_too_few_lines(small_hf):
    from megatron_cream.corpus.tokenizers import load_tokenizer
    from megatron_cream.evaluation.evaluation_tasks import TASKS
    from megatron_cream.evaluation.prompts import HaystackBuilder, Prompt
    from megatron_cream.evaluation.task_texts import longchat

    task = dataclasses.replace(TASKS["longchat-lines"], most=40)
    kit = HaystackBuilder(Prompt(load_tokenizer("HuggingFaceTokenizer", small_hf)))
    sizes = [kit._size(longchat(3, 2, count)) for count in (39, 40)]
    # 39 lines fit, though twice 32, which the search tries, are more than there are.
    assert kit.make(task, sum(sizes) // 2, 3, 2)[0].length == sum(sizes) // 2
    with pytest.raises(ValueError, match="--lengths has .*longchat-lines has no more than 40"):
        kit.make(task, sizes[1] + 100, 3, 2)


def cases_file(folder, count=3):
    path = folder / "cases.jsonl"
    record = {
        "random_idx": ["amber-oak", 0],
        "expected_number": 67890,
        "correct_line": LINE,
        "prompt": f"A record.\n{LINE}\nWhat is the number?",
    }
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(count)))
    return path


def test_a_file_of_cases_needs_no_lengths(tool, small_hf, tmp_path, capsys):
    words = ["longchat-lines", "--hf", small_hf, "--cases-file", str(cases_file(tmp_path))]
    assert tool.main([*words, "--output", str(tmp_path / "run")]) == 0
    plain = capsys.readouterr()
    assert "--lengths" not in plain.err
    assert tool.main([*words, "--lengths", "4K"]) == 0
    given = capsys.readouterr()
    assert given.out == plain.out
    assert "note: --lengths is not used: the cases of --cases-file have their own" in given.err
    cases_file(tmp_path, 2)
    assert exit_status(tool.main, [*words, "--output", str(tmp_path / "run")]) == 2
    assert "run of other settings (cases_file_content" in capsys.readouterr().err


def test_attention_follows_the_cases_of_a_file(small_hf, tmp_path, capsys):
    path = cases_file(tmp_path, 1)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"prompt": 200 * "A record.\n" + record["prompt"]}))
    asked = {
        "tasks": ["longchat-lines"],
        "hf": small_hf,
        "self_extend": [],
        "cases_file": str(path),
    }
    sizes = []
    for lengths in (None, [512], [65536]):
        (result,) = evaluate.evaluate(arguments(**asked, lengths=lengths))
        sizes.append(result["attention"]["group_size"])
    assert sizes[0] > 1 and set(sizes) == {sizes[0]}
    assert "note: --cases-file has" in capsys.readouterr().err


def test_tasks_without_files_are_refused_first(small_hf, tmp_path, unloaded):
    for task in ("needle", "perplexity"):
        asked = {"tasks": ["longchat-lines", task], "hf": small_hf, "lengths": None, "data": "x"}
        with pytest.raises(ValueError, match=f"--cases-file is given: {task} has none"):
            run(arguments(cases_file=str(cases_file(tmp_path)), **asked))


WRONG_CASES = [
    "3", "[]", '"text"', "null", '{"prompt": 3}', '{"prompt": null, "correct_line": "x"}',
    json.dumps({"prompt": LINE, "correct_line": LINE, "random_idx": [], "expected_number": 1}),
    json.dumps({"prompt": LINE, "correct_line": LINE, "random_idx": "x", "expected_number": []}),
    json.dumps({"prompt": LINE, "correct_line": LINE, "random_idx": [[1]], "expected_number": 1}),
    json.dumps({"ordered_kv_records": 3, "key": "a", "value": "b"}),
    json.dumps({"ordered_kv_records": [3], "key": "a", "value": "b"}),
    json.dumps({"ordered_kv_records": [["a", "b", "c"]], "key": "a", "value": "b"}),
    json.dumps({"ordered_kv_records": [["a", "b"]], "key": "a", "value": 3}),
    json.dumps({"ordered_kv_records": {"a": "b"}, "key": "a", "value": "b"}),
    "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG_CASES)))
@pytest.mark.parametrize("task", ["longchat-lines", "kv-retrieval"])
def test_wrong_cases_name_file_and_line(small_hf, tmp_path, unloaded, task, number):
    path = tmp_path / "cases.jsonl"
    path.write_text(WRONG_CASES[number] + "\n")
    asked = {"tasks": [task], "hf": small_hf, "lengths": None, "cases_file": str(path)}
    with pytest.raises(ValueError, match="--cases-file is .*cases.jsonl: ") as error:
        run(arguments(**asked))
    assert len(str(error.value)) < 1000


def test_no_picture_is_said_and_nothing_else_lost(tool, small_hf, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["longchat-lines", "--hf", small_hf, "--lengths", "384", "--cases", "1", "--seeds", "1"]
    assert tool.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("note: no picture.png")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"settings.json", "cases.jsonl", "result.json", "table.md"}


def test_flags_and_help_need_no_torch():
    code = "import sys, megatron_cream.evaluation.evaluate; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_several_tasks_do_not_write_into_a_folder_of_something_else(small_hf, tmp_path):
    (tmp_path / "table.md").write_text("mine")
    asked = {"tasks": ["needle", "passkey"], "hf": small_hf, "lengths": [900]}
    with pytest.raises(ValueError, match="--output is .* of a run of several tasks"):
        arguments(output=str(tmp_path), **asked).validate()
    assert (tmp_path / "table.md").read_text() == "mine"


def test_a_checkpoint_without_gpu_or_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--cpu is not given, and this machine has no GPU"):
        evaluate.open_model(arguments(checkpoint="run"))


def test_a_run_finds_the_tokenizer_of_the_import_it_began_from(small_hf, tmp_path, monkeypatch):
    """As the export does, over two runs, each trained with NullTokenizer."""

    base, runs = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    (base / "hf").mkdir(parents=True)
    for path in Path(small_hf).glob("*.json"):
        (base / "hf" / path.name).write_bytes(path.read_bytes())
    for folder in (base, *runs):
        folder.mkdir(exist_ok=True)
        (folder / "metadata.json").write_text("{}")
    null = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "load": None}
    saved = {
        str(base): Namespace(**null, pretrained_checkpoint=None),
        str(runs[0]): Namespace(**null, pretrained_checkpoint=str(base)),
        str(runs[1]): Namespace(**null, pretrained_checkpoint=str(runs[0])),
    }
    for module in (prompts, hf_folder):
        monkeypatch.setattr(module, "read_saved_arguments", lambda path: saved[str(path)])
    tokenizer, found = prompts.open_tokenizer(arguments(checkpoint=str(runs[1])))
    assert (
        found == str(base / "hf")
        and tokenizer.vocab_size == prompts.open_tokenizer(arguments(hf=small_hf))[0].vocab_size
    )
    (base / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model beside .*two or"):
        prompts.open_tokenizer(arguments(checkpoint=str(runs[1])))
