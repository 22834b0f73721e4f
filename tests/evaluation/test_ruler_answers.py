# SPDX-License-Identifier: Apache-2.0
"""The command ``evaluate ruler``: what a model writes is scored, tabled, drawn and kept."""

import json
import shutil
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from support import ruler as given
from support.arguments import arguments
from support.commands import exit_status
from support.evaluation import run
from transformers import AutoModelForCausalLM

from megatron_cream import cli
from megatron_cream.corpus.tokenizers import load_tokenizer
from megatron_cream.evaluation import evaluate as evaluation
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.prompts import open_prompt
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results_page import compare
from megatron_cream.evaluation.ruler import answers
from megatron_cream.evaluation.ruler.answers import open_cases, ruler_results
from megatron_cream.evaluation.ruler.sampler import FREQUENT

LENGTHS = [2600, 3000]
TASKS = ["qa_1", "niah_single_1", "fwe"]
IN_ORDER = ["niah_single_1", "fwe", "qa_1"]  # that of RULER, and by tokens to write


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "squad.json"
    path.write_text(json.dumps(given.squad()))
    return str(path)


@pytest.fixture(scope="module")
def asked(small_hf, squad):
    """Settings of a run of three tasks, three cases each."""

    def settings(**changes):
        common = {"tasks": ["ruler"], "hf": small_hf, "lengths": LENGTHS, "qa": [squad]}
        return arguments(**(common | {"ruler_tasks": TASKS, "samples": 3} | changes))

    return settings


@pytest.fixture(scope="module")
def with_bos(small_hf, tmp_path_factory):
    """The small model with a tokenizer that has a token which begins a text."""
    folder = tmp_path_factory.mktemp("bos") / "hf"
    shutil.copytree(small_hf, folder)
    path = folder / "tokenizer_config.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps(words | {"bos_token": words["eos_token"]}))
    return folder


class Oracle:
    """A model that knows every case, and writes what ``says`` makes of its answers.

    Args:
        says: length, task, index and answers to a text.
    """

    name, window, vocabulary, primary, stop_tokens = "oracle", 2700, 384, True, ()

    def __init__(self, settings, says):
        self.settings, self.asked, self.stops = {"dtype": "float32"}, [], set()
        prompt = open_prompt(settings)
        cases = open_cases(settings, prompt)
        self.tokenizer = prompt.tokenizer
        self._written = {
            one.tokens.tobytes(): (says(*key, i, list(one.case.answers)), (*key, i))
            for key, own in cases.items()
            for i, one in enumerate(own)
        }

    def set_length(self, length):
        self.length = length

    def generate(self, prompts, new_tokens, stop):
        self.stops.add(tuple(stop))
        for prompt, most in zip(prompts, new_tokens, strict=True):
            text, key = self._written[prompt.tobytes()]
            assert key[0] == self.length and ruler.new_tokens(key[1]) == most
            self.asked.append(key)
            yield self.tokenizer.encode([text])[0].astype(np.int64)


def some_right(length, task, index, answers):
    """Needles: all at the short length, one of three at the long one. fwe: two of three words."""
    if task == "niah_single_1":
        right = length == LENGTHS[0] or index == 0
        return f" is: {answers[0]}." if right else "12345"
    return " ".join(answers[:2]).upper() if task == "fwe" else f"It is {answers[-1].upper()}\n"


@pytest.fixture
def oracle(monkeypatch):
    """Have a run use a model that writes what is asked for."""

    def use(settings, says=some_right):
        model = Oracle(settings, says)
        monkeypatch.setattr(evaluation, "open_model", lambda *_: model)
        return model

    return use


def test_known_answers_have_known_scores(asked, oracle, tmp_path):
    settings = asked(output=str(tmp_path / "run"), name="known", threshold=88)
    model = oracle(settings)
    printed = run(settings)
    assert model.asked == [(n, t, i) for n in LENGTHS for t in IN_ORDER for i in range(3)]
    result = read_result(tmp_path / "run")
    short, long = (row["scores"] for row in result["lengths"])
    assert short == {
        "niah_single_1": {"string_match_all": 100.0},
        "fwe": {"string_match_all": 66.67},
        "qa_1": {"string_match_part": 100.0},
    }
    assert long == short | {"niah_single_1": {"string_match_all": 33.33}}
    first, second = 266.67 / 3, 200.0 / 3
    assert [row["average"] for row in result["lengths"]] == pytest.approx([first, second])
    assert result["weighted_average_increasing"] == pytest.approx((first + 2 * second) / 3)
    assert result["weighted_average_decreasing"] == pytest.approx((2 * first + second) / 3)
    assert result["effective_length"] == 2600 and result["threshold"] == 88
    lines = printed.splitlines()
    assert lines[2] == "| length | niah_single_1 | fwe | qa_1 | average | cases per task |"
    assert lines[4:6] == [
        "| 2600 | 100.0 | 66.7 | 100.0 | 88.9 | 3 |",
        "| 3000\\* | 33.3 | 66.7 | 100.0 | 66.7 | 3 |",
    ]
    wanted = "wAvg (inc) 74.1, wAvg (dec) 81.5, effective length 2600 (average at least 88)"
    assert wanted in printed
    assert "3 of RULER's 13 tasks" in printed
    assert (tmp_path / "run" / "table.md").read_text().strip() == printed
    assert (tmp_path / "run" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_continues(asked, oracle, tmp_path):
    whole = asked(output=str(tmp_path / "whole"))
    oracle(whole)
    run(whole)
    lines = (tmp_path / "whole" / "cases.jsonl").read_bytes().splitlines(keepends=True)
    again = tmp_path / "again"
    again.mkdir()
    (again / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
    (again / "cases.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    model = oracle(asked(output=str(again)))
    run(asked(output=str(again)))
    assert len(model.asked) == 14 and model.asked[0] == (2600, "fwe", 1)
    assert (again / "cases.jsonl").read_bytes() == b"".join(lines)
    result = (tmp_path / "whole" / "result.json").read_bytes()
    assert (again / "result.json").read_bytes() == result
    # The threshold decides no case; other tasks do.
    run(asked(output=str(again), threshold=50))
    assert read_result(again)["effective_length"] == 3000
    with pytest.raises(ValueError, match="run of other settings .ruler_tasks"):
        run(asked(output=str(again), ruler_tasks=["fwe"]))


def test_a_length_counts_when_all_of_its_cases_are_answered():
    record = {"length": 8, "task": "vt", "score": 1.0}
    rest = {"length": 16, "task": "vt", "score": 0.0}
    found = ruler_results([record, record, rest], ["vt"], 2, 85.6)
    assert [row["length"] for row in found["lengths"]] == [8]


def test_a_question_file_of_other_content_is_another_run(asked, oracle, squad, tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(given.squad()))
    settings = asked(output=str(tmp_path / "run"), qa=[str(path)], ruler_tasks=["qa_1"])
    oracle(settings)
    run(settings)
    path.write_text(json.dumps(given.squad()) + " ")
    with pytest.raises(ValueError, match="run of other settings .qa_content"):
        run(settings)


def test_compare(asked, oracle, tmp_path):
    for name, says in (("some", some_right), ("none", lambda *_: "no")):
        settings = asked(output=str(tmp_path / name), name=name)
        oracle(settings, says)
        run(settings)
    both = [str(tmp_path / "some"), str(tmp_path / "none")]
    table = compare(both, str(tmp_path / "both"))
    assert "| model | 2600 | 3000 | effective length |" in table
    assert "| some | 88.9 | 66.7 | 2600 |" in table and "| none | 0.0 | 0.0 | none |" in table
    assert (tmp_path / "both" / "picture.png").stat().st_size > 10_000
    settings = asked(output=str(tmp_path / "fewer"), samples=1, ruler_tasks=["fwe"])
    oracle(settings)
    run(settings)
    with pytest.raises(ValueError, match="fewer has samples 1"):
        compare([both[0], str(tmp_path / "fewer")], None)


WRONG = {
    "scores in lengths": lambda row, _: row["scores"].pop("fwe"),
    "average in lengths": lambda row, _: row.update(average=101),
    "ruler_tasks": lambda _, result: result.update(ruler_tasks=["needle"]),
    "threshold": lambda _, result: result.update(threshold=None),
}


@pytest.mark.parametrize("what", WRONG)
def test_damaged_results_are_named(what, tmp_path):
    records = [{"length": 8, "task": task, "score": 1.0} for task in ("vt", "fwe")]
    result = {"task": "ruler", "name": "m", "window": 8, "ruler_tasks": ["vt", "fwe"]}
    result |= ruler_results(records, ["vt", "fwe"], 1, 85.6)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_result(tmp_path) == result
    WRONG[what](result["lengths"][0], result)
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"no right {what}"):
        read_result(tmp_path)


def test_a_model_writes_what_generate_does(asked, with_bos, tmp_path):
    own = {"hf": str(with_bos), "output": str(tmp_path / "run"), "bos": True}
    settings = asked(ruler_tasks=["niah_single_1"], lengths=[1100], **own)
    run(settings)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "cases.jsonl").read_text().splitlines()
    ]
    tokenizer = load_tokenizer("HuggingFaceTokenizer", with_bos)
    module = AutoModelForCausalLM.from_pretrained(with_bos)
    cases = open_cases(settings, open_prompt(settings))
    for record, one in zip(records, cases[1100, "niah_single_1"], strict=True):
        case = one.case
        read = [tokenizer.bos, *tokenizer.encode([case.prompt + case.prefix])[0]]
        assert len(read) - 1 + 128 == record["case_tokens"] <= 1100
        tokens = torch.tensor([read])
        made = module.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=128,
            do_sample=False,
            pad_token_id=0,
        )
        new = made[0, len(read) :].tolist()
        new = new[: new.index(2)] if 2 in new else new  # its eos
        assert record["written_tokens"] == len(new)
        known = [token for token in new if token < tokenizer.vocab_size]
        assert record["written"] == tokenizer.decode(known)


def test_without_stop_tokens_the_tokenizers_ends_an_answer(asked, oracle):
    settings = asked(ruler_tasks=["fwe"], lengths=[1100], samples=1)
    model = oracle(settings)
    run(settings)
    assert model.stops == {(model.tokenizer.eod,)}


def test_prompts_of_chat_models(asked, with_bos, tmp_path):
    own = {"ruler_tasks": ["fwe"], "lengths": [1100], "samples": 1}
    settings = asked(prompt="meta-llama3", **own)
    llama = open_cases(settings, open_prompt(settings))
    before, after = ruler.MODEL_TEMPLATES["meta-llama3"].split("{task_template}")
    case = llama[1100, "fwe"][0].case
    assert case.prompt.startswith(before) and case.prompt.endswith(after)
    assert case.prefix == FREQUENT.prefix
    shutil.copytree(with_bos, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{{ bos_token }}<u>{{ messages[0]['content'] }}</u><a>"
    )
    settings = asked(hf=str(tmp_path / "hf"), prompt="chat", bos=True, **own)
    prompt = open_prompt(settings)
    chat = open_cases(settings, prompt)
    one = chat[1100, "fwe"][0]
    case = one.case
    bos = prompt.tokenizer.decode([prompt.tokenizer.bos])
    assert case.prompt.startswith(f"{bos}<u>") and case.prompt.endswith("</u><a>")
    assert one.tokens.tolist().count(prompt.tokenizer.bos) == 1


def test_cases_made_in_other_processes_are_the_same(asked, monkeypatch):
    tasks = ["niah_single_1", "niah_multikey_3", "fwe", "qa_1"]
    settings = asked(lengths=[2600, 3000], ruler_tasks=tasks, samples=2)
    prompt = open_prompt(settings)
    here = open_cases(settings, prompt)
    monkeypatch.setattr(answers, "_FEW_TOKENS", 0)
    monkeypatch.setattr(answers, "_processes", lambda: 2)
    with closing(open_cases(settings, prompt)) as beside:
        assert list(beside) == list(here) and len(here) == 8
        for key, own in here.items():
            assert [one.case for one in beside[key]] == [one.case for one in own]
            for one, other in zip(beside[key], own, strict=True):
                assert np.array_equal(one.tokens, other.tokens)
    with pytest.raises(ValueError, match="--lengths has 300: it is too short for"):
        open_cases(asked(lengths=[300, 4096]), prompt)


BAD = {
    "niah_single_2 needs --haystack FILE": ["--tasks", "niah_single_2"],
    "qa_2 needs --qa FILE in HotpotQA's form": ["--tasks", "qa_2", "--qa", "SQUAD"],
    "there must be one file in SQuAD's form, not two": ["--qa", "SQUAD", "SQUAD"],
    "--lengths has 700: it is too short for cwe": ["--lengths", "700", "--tasks", "cwe"],
    "--lengths has 300: it is too short for fwe": ["--lengths", "300", "--tasks", "fwe"],
    "--lengths is missing": ["--tasks", "fwe", "--lengths-left-out"],
    "--samples is 100: it must be at most 35 for qa_1": [
        *("--tasks", "qa_1", "--qa", "SQUAD", "--samples", "100"),
    ],
    "--samples has 0: it must be at least 1": ["--samples", "0"],
    "--threshold has 101.0: it must be from 0 to 100": ["--threshold", "101"],
    "--threshold has nan": ["--threshold", "nan"],
    "--prompt is 'llama': it must be one of base, ": ["--prompt", "llama"],
    "--words is SQUAD: it needs a JSON object": ["--words", "SQUAD"],
    "--haystack needs nltk": ["--haystack", "TEXT", "--tasks", "niah_single_2"],
    "unrecognized arguments: --cases-file x": ["--cases-file", "x"],
    "argument --tasks: invalid choice: 'needle'": ["--tasks", "needle"],
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_one_line_before_a_model(
    message, small_hf, squad, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(evaluation, "open_model", fail)
    monkeypatch.setitem(sys.modules, "nltk", None)
    text = tmp_path / "essay.txt"
    text.write_text(given.essay())
    words = [{"SQUAD": squad, "TEXT": str(text)}.get(word, word) for word in BAD[message]]
    if "--lengths-left-out" in words:
        words.remove("--lengths-left-out")
    elif "--lengths" not in words:
        words += ["--lengths", "1100"]
    assert exit_status(cli.main, ["evaluate", "ruler", "--hf", small_hf, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message.replace("SQUAD", squad) in error


def test_ruler_is_a_run_of_its_own(small_hf, capsys):
    with pytest.raises(ValueError, match="ruler must be the only one"):
        arguments(tasks=["ruler", "needle"], hf=small_hf).validate()
    words = ["--hf", small_hf, "--lengths", "4K", "--tasks", "ruler"]
    assert exit_status(cli.main, ["evaluate", "all", *words]) == 2
    assert "invalid choice: 'ruler'" in capsys.readouterr().err
    words = ["--hf", small_hf, "--lengths", "4K", "--haystack", "x"]
    assert exit_status(cli.main, ["evaluate", "needle", *words]) == 2
    assert "unrecognized arguments: --haystack" in capsys.readouterr().err
