# SPDX-License-Identifier: Apache-2.0
"""One process writes a run's folder, each case counts once, damaged files are refused by name."""

import json

import pytest
from support.arguments import arguments
from support.evaluation import run

from megatron_cream.evaluation.result_files import (
    CASE_RECORDS,
    DOCUMENT_RECORDS,
    NUMBER_CASE_RECORDS,
    read_result,
)
from megatron_cream.evaluation.results_page import compare
from megatron_cream.evaluation.store import ResultStore

SETTINGS = {"task": "needle", "seeds": 2}


def case(**changes):
    return {
        **{"length": 384, "seed": 0, "haystack": 0, "index": 0, "where": 0.5, "hit": True},
        **{"items": 1.0, "tokens": 1.0, "logprob": -0.5, "answer_tokens": 3, **changes},
    }


def test_one_process_at_a_time(tmp_path):
    with ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS) as first:
        first.add([case()])
        with pytest.raises(BlockingIOError, match=r"--output is .*another process writes"):
            ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS)
        other_rank = ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS, primary=False)
        assert other_rank.finished == [case()]
    with ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS) as again:
        assert again.finished == [case()]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"settings.json", "cases.jsonl"}


def test_a_refused_run_leaves_the_folder_free(tmp_path):
    ResultStore(tmp_path, SETTINGS, CASE_RECORDS).close()
    for settings in ({"task": "passkey"}, SETTINGS):
        if settings == SETTINGS:
            (tmp_path / "cases.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match="--output is"):
            ResultStore(tmp_path, settings, CASE_RECORDS)
    (tmp_path / "cases.jsonl").unlink()
    ResultStore(tmp_path, SETTINGS, CASE_RECORDS).close()


def test_a_second_evaluation_while_one_runs(small_hf, tmp_path):
    asked = {"tasks": ["longchat-lines"], "hf": small_hf, "lengths": [384]}
    table = run(arguments(output=str(tmp_path / "run"), **asked))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    with (
        ResultStore(tmp_path / "run", settings, NUMBER_CASE_RECORDS),
        pytest.raises(BlockingIOError, match="another process writes"),
    ):
        run(arguments(output=str(tmp_path / "run"), **asked))
    assert run(arguments(output=str(tmp_path / "run"), **asked)) == table


def test_mixed_cases_of_two_runs_are_refused(small_hf, tmp_path):
    """What two processes left behind without a lock: every case twice."""
    asked = arguments(tasks=["longchat-lines"], hf=small_hf, lengths=[384], output=str(tmp_path))
    run(asked)
    lines = tmp_path / "cases.jsonl"
    lines.write_text(lines.read_text() * 2)
    with pytest.raises(ValueError, match=r"line 7 of cases.jsonl has length 384, .* a second time"):
        run(asked)


@pytest.mark.parametrize("changes", [{"seed": 7}, {"index": 3}, {"haystack": 1}])
def test_cases_that_the_run_does_not_make(small_hf, tmp_path, changes):
    asked = arguments(tasks=["longchat-lines"], hf=small_hf, lengths=[384], output=str(tmp_path))
    run(asked)
    lines = tmp_path / "cases.jsonl"
    other = json.loads(lines.read_text().splitlines()[0]) | changes
    del other["seal"]
    lines.write_text(lines.read_text() + json.dumps(other) + "\n")
    with pytest.raises(ValueError, match=r"--output is .*which this run does not make"):
        run(asked)


def test_documents_that_the_run_does_not_score(small_hf, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is the pass key? " * 400)
    folder = tmp_path / "run"
    asked = {"hf": small_hf, "data": str(text), "documents": 1, "output": str(folder)}
    run(arguments(**asked))
    lines = folder / "cases.jsonl"
    first = json.loads(lines.read_text())
    del first["seal"]
    lines.write_text(lines.read_text() + json.dumps(first | {"document": 1}) + "\n")
    with pytest.raises(ValueError, match=r"has length 96, document 1, which this run does not"):
        run(arguments(**asked))
    lines.write_text("")
    text.write_text("The register content is here. " * 400)
    with pytest.raises(ValueError, match="run of other settings .data_content"):
        run(arguments(**asked))


def test_cases_made_with_other_settings(tmp_path):
    for name in ("one", "two"):
        with ResultStore(tmp_path / name, {"task": "needle", "model": name}, CASE_RECORDS) as store:
            store.add([case()])
    (tmp_path / "one" / "cases.jsonl").write_bytes((tmp_path / "two" / "cases.jsonl").read_bytes())
    with pytest.raises(ValueError, match="line 1 of cases.jsonl is not what this run wrote"):
        ResultStore(tmp_path / "one", {"task": "needle", "model": "one"}, CASE_RECORDS)


def test_a_line_that_was_changed(tmp_path):
    with ResultStore(tmp_path, SETTINGS, CASE_RECORDS) as store:
        store.add([case(hit=False)])
    path = tmp_path / "cases.jsonl"
    path.write_text(path.read_text().replace("false", "true"))
    with pytest.raises(ValueError, match="line 1 of cases.jsonl is not what this run wrote"):
        ResultStore(tmp_path, SETTINGS, CASE_RECORDS)


def test_a_folder_of_an_earlier_version_is_continued(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "cases.jsonl").write_text(json.dumps(case()) + "\n")
    with ResultStore(tmp_path, SETTINGS | {"cases_file_content": "1f"}, CASE_RECORDS) as store:
        assert store.finished == [case()]
        store.add([case(index=1)])
    with ResultStore(tmp_path, SETTINGS | {"cases_file_content": "1f"}, CASE_RECORDS) as store:
        assert len(store.finished) == 2


DAMAGED = {
    "text": "nothing", "list": "[]", "number": "3", "nothing": "null", "deep": "[" * 100_000,
    "length": json.dumps(case(length="384")), "bool": json.dumps(case(length=True)),
    "share": json.dumps(case(where=7)), "hit": json.dumps(case(hit="yes")),
    "answer": json.dumps(case(answer_tokens=0)), "large": json.dumps(case(seed=10**30)),
    "lacks": json.dumps({k: v for k, v in case().items() if k != "logprob"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_lines_are_named(tmp_path, kind):
    with ResultStore(tmp_path, SETTINGS, CASE_RECORDS) as store:
        store.add([case()])
    with open(tmp_path / "cases.jsonl", "a") as file:
        file.write(DAMAGED[kind] + "\n")
    with pytest.raises(ValueError, match=r"--output is .*line 2 of cases.jsonl is damaged"):
        ResultStore(tmp_path, SETTINGS, CASE_RECORDS)


@pytest.mark.parametrize(
    "changes", [{"targets": [0, 0]}, {"nll": [1.0]}, {"targets": [1, 2, 3]}, {"nll": []}]
)
def test_damaged_documents_are_named(tmp_path, changes):
    record = {"length": 512, "document": 0, "nll": [3.0, 2.0], "targets": [2, 1]}
    with ResultStore(tmp_path, {"task": "perplexity"}, DOCUMENT_RECORDS) as store:
        store.add([record, record | {"document": 1} | changes])
    with pytest.raises(ValueError, match="line 2 of cases.jsonl is damaged"):
        ResultStore(tmp_path, {"task": "perplexity"}, DOCUMENT_RECORDS)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"task": "needle"', "\x00\xff"])
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"--output is .*settings.json (is not|must hold)"):
        ResultStore(tmp_path, SETTINGS, CASE_RECORDS)
    assert (tmp_path / "settings.json").read_bytes() == text.encode("latin-1")


def test_a_full_disk_leaves_no_half_settings(tmp_path, monkeypatch):
    import builtins

    own = builtins.open

    def full(path, *args, **options):
        if isinstance(path, int):
            own(path, "wb").close()
            raise OSError(28, "No space left on device")
        return own(path, *args, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="No space left"):
        ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS)
    monkeypatch.undo()
    ResultStore(tmp_path / "run", SETTINGS, CASE_RECORDS).close()


def row(**changes):
    return {
        **{"length": 384, "cases": 6, "haystacks": 2, "hit": 0.5, "hit_low": 0.1, "hit_high": 0.9},
        **{"items": 0.5, "tokens": 0.5, "logprob_per_token": -1.0, **changes},
    }


def result(**changes):
    return {"task": "common-words", "name": "m", "window": 512, "lengths": [row()], **changes}


def perplexities(**changes):
    lengths = {
        **{"length": 384, "perplexity": 3.0, "low": None, "high": None, "nll": 1.1},
        **{"targets": 9, "documents": 1, "document_nll": [1.1], **changes},
    }
    at = {"length": 384, "from": 0, "to": 384, "perplexity": 3.0, "targets": 9}
    return result(task="perplexity", lengths=[lengths], positions=[at])


WRONG = {
    "task": result(task="unknown"),
    "name": result(name=None),
    "window": result(window=0),
    "lengths": result(lengths=[]),
    "hit in lengths": result(lengths=[row(hit=None)]),
    "one is there twice": result(lengths=[row(), row()]),
    "number": result(lengths=[row(), row(length=768, number=0.5)]),
    "places": result(task="needle"),
    "where in places": result(task="needle", places=[row()]),
    "perplexity in lengths": result(task="perplexity"),
    "positions": {**perplexities(), "positions": None},
    "document_nll": perplexities(documents=2),
    "most_tokens": result(most_tokens="many"),
}


@pytest.mark.parametrize("what", WRONG)
def test_damaged_results_are_named(tmp_path, what):
    (tmp_path / "result.json").write_text(json.dumps(WRONG[what]))
    with pytest.raises(ValueError, match=rf"RUN is .*result.json has no right .*{what}"):
        read_result(tmp_path)


@pytest.mark.parametrize("good", [result(), perplexities(), perplexities(perplexity=float("inf"))])
def test_results_that_are_right(tmp_path, good):
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert compare([str(tmp_path)], None)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_results_that_are_no_object_are_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"RUN is .*result.json (is not JSON|must hold)"):
        compare([str(tmp_path)], None)


def test_compare_overwrites_no_run(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result(name=name)))
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(ValueError, match="--output is .* would be overwritten"):
        compare([str(tmp_path / "run"), str(tmp_path / "other")], str(tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    for _ in range(2):  # that of an earlier comparison may be written again
        compare([str(tmp_path / "run"), str(tmp_path / "other")], str(tmp_path / "both"))


KEYS = ["stride", "documents", "document_tokens", "data", "data_content", "records_of"]


@pytest.mark.parametrize("key", KEYS)
def test_runs_of_other_documents_or_records_are_not_compared(tmp_path, key):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        text = json.dumps({**perplexities(), key: value})
        (tmp_path / name / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"two has {key} 2: .*one has 1; runs to compare"):
        compare([str(tmp_path / "one"), str(tmp_path / "two")], None)


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = []
    for folder, name in (("one", "m"), ("two", "m"), ("three", "n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(result(name=name)))
        runs.append(str(tmp_path / folder))
    table = compare(runs, None)
    assert all(f"| {folder} |" in table for folder in ("one", "two", "three"))
    table = compare(runs[1:], None)
    assert "| m |" in table and "| n |" in table
