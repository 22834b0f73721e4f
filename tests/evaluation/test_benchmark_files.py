# SPDX-License-Identifier: Apache-2.0
"""Files of five long benchmarks are read, and become tasks of lm-eval."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_cream.errors import UserError
from megatron_cream.evaluation import benchmark_files
from megatron_cream.evaluation.benchmark_files import choice, contains, f1, process_results

FILES = {
    "narrativeqa": [{
        "input": "Who?", "context": "A tale.", "answers": ["Ann", "Ann B."], "length": 2,
        "dataset": "narrativeqa", "language": "en", "all_classes": None, "_id": "1",
    }],
    "kv_retrieval": [{
        "id": 0, "context": "{}", "input": "Key: 1", "answer": "v", "options": [],
    }],
    "qasper": [{"id": "1", "pid": "1_0", "input": "What?\n\nA paper.", "output": "a method"}],
    "coursera": [{
        "instructions": ["Q1 (A) (B)", "Q2"], "input": "A lecture.", "outputs": ["A", "B"],
        "source": "s", "evaluation": "exam",
    }],
    "nq": [{
        "question": "Who?", "answers": ["Ann"],
        "ctxs": [{"title": "T", "text": "one"}, {"title": "U", "text": "two"}],
    }],
    "json_kv": [{"context": "{}", "question": "k", "answer": "v"}],
}  # fmt: skip
READ = {
    "narrativeqa": ("longbench", [{
        "context": "A tale.", "answers": ["Ann", "Ann B."], "question": "Who?", "all_classes": [],
    }]),
    "kv_retrieval": ("infinitebench", [{
        "id": 0, "context": "{}", "input": "Key: 1", "answer": ["v"], "options": [],
    }]),
    "qasper": ("scrolls", [{
        "prompt": "What?\n\nA paper.\n\nAnswer:", "answers": ["a method"], "score": "f1",
    }]),
    "coursera": ("leval", [
        {"prompt": f"A lecture.\n\n{asked}\n\nAnswer:", "answers": [right], "score": "choice"}
        for asked, right in (("Q1 (A) (B)", "A"), ("Q2", "B"))
    ]),
    "nq": ("helmet", [{
        "prompt": "Document 1 (Title: T): one\n\nDocument 2 (Title: U): two\n\n"
        "Question: Who?\nAnswer:", "answers": ["Ann"], "score": "contains",
    }]),
    "json_kv": ("helmet", [{
        "prompt": "{}\n\nQuestion: k\nAnswer:", "answers": ["v"], "score": "contains",
    }]),
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_each_format_is_read(name, data):
    assert benchmark_files.read_file(data / f"{name}.jsonl") == READ[name]


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder that has the names of lm-eval's tasks, where lm-eval is not installed."""
    package = tmp_path / "lm_eval"
    for name in ("longbench/narrativeqa", "infinitebench/infinitebench_kv_retrieval"):
        path = package / "tasks" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.touch()
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(benchmark_files, "find_spec", lambda _: spec)
    return package / "tasks"


def test_tasks(data, own_tasks, tmp_path, capsys):
    output = tmp_path / "tasks"
    assert benchmark_files.main([str(data), str(output)]) == 0
    names = ",".join(f"long_{name}" for name in sorted(FILES))
    assert f"--include_path {output} --tasks {names}" in capsys.readouterr().out

    class Loader(yaml.SafeLoader):
        """Takes a function for its name."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    for name in FILES:
        task = yaml.load((output / f"long_{name}.yaml").read_text(), Loader)
        rows = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text("utf-8")
        lines = [json.loads(line) for line in rows.splitlines()]
        assert lines == READ[name][1] and task["task"] == f"long_{name}"
        if "include" in task:
            assert task["include"].startswith(str(own_tasks))
        else:
            assert task["process_results"] == "scores.process_results"
            assert task["generation_kwargs"]["max_gen_toks"] > 0
    sys.path.insert(0, str(output))
    try:
        assert importlib.import_module("scores").process_results is process_results
    finally:
        sys.path.remove(str(output))
        del sys.modules["scores"]


def test_scores():
    assert f1("The big cat.", "a cat") == pytest.approx(2 / 3)
    assert f1("dog", "a cat") == 0
    assert contains("It is Ann B, yes", "the ann b.") == 1 and contains("Anna", "Ann") == 0
    assert choice(" (B) since A", "B") == 1 and choice("none", "B") == 0
    row = {"answers": ["x", "cat"], "score": "f1"}
    assert process_results(row, ["a cat"]) == {"score": 100.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it has no rows"),
        ("{", "line 1 is of none of longbench, "),
        ('{"a": 1}\n', "line 1 is of none of longbench, "),
        ('\n{"question": "q"}\n', "line 2 is not of helmet .KeyError"),
        ('{"instructions": ["a"], "input": "i", "outputs": []}', "line 1 is not of leval"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        benchmark_files.read_file(path)


def test_a_file_that_lm_eval_has_no_task_for(data, own_tasks, tmp_path):
    (data / "narrativeqa.jsonl").rename(data / "mine.jsonl")
    with pytest.raises(UserError, match="lm-eval has no task mine of longbench"):
        benchmark_files.write_task(data / "mine.jsonl", tmp_path)
