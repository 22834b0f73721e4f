# SPDX-License-Identifier: Apache-2.0
"""The study's runner: order, time, what is finished; training and scoring are stood in for."""

import json
import sys
import time
from pathlib import Path

import pytest
from support.evaluation import write_small_hf

from megatron_cream.positions import STRATEGIES
from megatron_cream.rope import SCALINGS

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
STEP = (
    " iteration {0}/ 2 | elapsed time per iteration (ms): {1} | lm loss: {2} | grad norm: 1.0 |\n"
)
LOG = (
    STEP.format(1, 900.0, "9.0E+00")
    + "$ python -m torch.distributed.run\n"
    + "[Rank 0] memory (MB) | allocated: 0.00 | max allocated: 2048.00 | reserved: 0.00\n"
    + STEP.format(1, 900.0, "3.5E+00")
    + STEP.format(2, 500.0, "2.25E+00")
)
CASES = [
    {"length": 64, "seed": s, "haystack": 0, "index": i, "where": i / 3, "hit": i == 1 or s == 1}
    for s in (1, 0)
    for i in range(4)
]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    for name in ("study", "variants", "results", "score", "rank"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import study

    monkeypatch.setattr(study, "device", lambda gpu: "none")
    monkeypatch.setattr(study, "commit", lambda: "c0ffee")
    return study


def score(folder):
    shares = {"hit": 0.625, "hit_low": 0.3, "hit_high": 0.9, "tokens": 0.7}
    row = {"length": 64, "logprob_per_token": -1.0, **shares}
    task = folder / "needle"
    task.mkdir(parents=True, exist_ok=True)
    (task / "result.json").write_text(json.dumps({"lengths": [row]}))
    (task / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))


@pytest.fixture
def run(study, monkeypatch, tmp_path):
    """Runs the study with stand-ins; returns what was left and the steps that were done."""
    steps = []

    def call(arguments, log, gpu=None):
        words = list(map(str, arguments))
        after = dict(zip(words, words[1:], strict=False))
        if "megatron_cream.pretrain" in words:
            steps.append(("train", log.parent.name))
            if log.parent.name == broken[0]:
                log.write_text("out of memory\n")
                return False
            log.write_text(LOG)
        elif words[0].endswith("score.py"):
            if "needle" in words:  # in the second of two processes
                steps.append(("score", log.parent.name))
                score(Path(after["--output"]))
        elif "export" in words:
            Path(after["--output"]).mkdir()
        else:
            made = after.get("--output") or after["--output-prefix"] + ".idx"
            Path(made).touch()
        return True

    broken = [None]

    def go(*flags, fails=None):
        broken[0] = fails
        steps.clear()
        places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        argv = ["study.py", "--hf", "m", "--text", "t", "--held-out", "h", *places, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        return study.Study(study.parse_args()).run(), list(steps)

    monkeypatch.setattr(study, "call", call)
    monkeypatch.setattr(study.Study, "machine", lambda self: [])  # asks what is installed
    return go


def test_variants_can_be_asked_for_and_have_names_of_their_own(study):
    titles = [variant.title for variant in study.VARIANTS]
    assert len(set(titles)) == len(titles)
    for variant in study.VARIANTS:
        assert variant.method in (None, *STRATEGIES)
        assert variant.rope in (None, *SCALINGS)


@pytest.mark.parametrize("page", ["docs/study.md", "docs/choosing.md", "README.md"])
def test_the_tables_of_a_page_are_those_of_the_committed_results(study, page):
    from results import filled

    text = (STUDY.parents[1] / page).read_text("utf-8")
    assert filled(text, STUDY / "results") == text
    assert page != "docs/study.md" or text.count("<!-- results: ") >= 8


def test_a_table_is_written_below_its_command_in_place_of_the_old_one(study):
    from results import filled, price, read_runs

    page = "# A\n<!-- results: price scatter-answers-only-0.50 -->\n| old |\n|---|\n\nprose\n"
    table = price(read_runs(STUDY / "results", ["scatter-answers-only-0.50"]))
    done = filled(page, STUDY / "results")
    assert done.endswith(f"-->\n{table}\n\nprose\n") and "old" not in done
    assert filled(done, STUDY / "results") == done


def test_differences_have_the_interval_of_their_cases_and_seeds(study, tmp_path, monkeypatch):
    import results

    seeds = {"all": (1, 2), "none": (1, 2), "half": (1, 3)}
    known = [study.Variant(name, "cream", seed=s) for name in seeds for s in seeds[name]]
    monkeypatch.setattr(results, "VARIANTS", known)

    def write(name, seed, hits):
        tasks = dict.fromkeys(results.COLUMNS[1:], dict.fromkeys(("4096", "32768"), {"hits": hits}))
        (tmp_path / f"{name}-seed{seed}.json").write_text(json.dumps({"tasks": tasks}))

    def difference(*names):
        return results.difference(results.read_runs(tmp_path, names))

    for seed in (1, 2):
        write("all", seed, "1" * 100)
        write("none", seed, "0" * 100)
    write("half", 1, "10" * 50)
    assert "| passkey | +100 [+100, +100] |" in difference("all", "none")
    # One seed and 100 cases of a fair coin: 1.96 * 5 points to either side.
    assert "| needle | +50 [+40, +60] |" in difference("half", "none")
    (tmp_path / "half-seed1.json").unlink()
    write("half", 3, "1" * 100)  # a seed that the others do not have
    with pytest.raises(SystemExit, match="no seed of both"):
        difference("half", "none")
    with pytest.raises(SystemExit, match="no run of absent"):
        difference("none", "absent")


def test_a_model_is_scored_for_real(study, tmp_path):
    import score as scoring

    hf = write_small_hf(tmp_path / "hf")
    scoring.SMOKE = {"needle": ("--lengths", "768", "--cases", "1", "--seeds", "1")}
    scoring.score(str(hf), "none", str(tmp_path / "m" / "scores"), True, ["needle"], [])
    found = json.loads((tmp_path / "m" / "scores" / "needle" / "result.json").read_text())
    assert found["name"] == "m" and found["lengths"][0]["cases"] == 1


def test_what_is_finished_is_not_done_again(run, tmp_path):
    only = ["--only", "before", "cream-seed1"]
    left, steps = run(*only)
    assert left == 0
    assert steps == [("score", "before"), ("train", "cream-seed1"), ("score", "cream-seed1")]
    assert run(*only) == (0, [])
    found = json.loads((tmp_path / "results" / "cream-seed1.json").read_text())
    assert found["variant"]["method"] == "cream" and found["settings"]["commit"] == "c0ffee"
    # Of a log of two tries the last; of its rate the steps behind the first.
    assert found["training"] == {
        "losses": [[1, 3.5], [2, 2.25]],
        "milliseconds_a_step": 500.0,
        "tokens_a_second": 16 * 8192 * 2,
        "peak_memory_gib": 2.0,
    }
    assert set(found["seconds"]) == {"train", "score"}
    row = found["tasks"]["needle"]["64"]
    assert row["hits"] == "01001111" and row["cases"] == 8
    assert row["middle"] == 75.0  # places 1/3 and 2/3: 1 0 and 1 1


def test_nothing_is_begun_that_would_not_end_in_time(run):
    only = ["--only", "cream-seed1", "plain-seed1"]
    limits = ["--train-seconds", "30", "--score-seconds", "600"]
    left, steps = run(*only, *limits, "--minutes", "1")
    assert left == 2 and steps == [("train", "cream-seed1")]
    left, steps = run(*only)
    assert left == 0
    assert steps == [("score", "cream-seed1"), ("train", "plain-seed1"), ("score", "plain-seed1")]


def test_variants_that_are_asked_for_are_run_in_that_order(run):
    _, steps = run("--only", "plain-seed1", "before", "cream-seed1")
    assert [name for step, name in steps if step == "score"] == [
        *("plain-seed1", "before", "cream-seed1"),
    ]
    with pytest.raises(SystemExit):
        run("--only", "cream")  # no seed


def test_tables_of_rivals_and_of_the_price_are_of_runs_that_have_them(study, tmp_path):
    from results import price, read_runs, rivals

    def hits(*found):
        return dict(zip(("32768", "16384", "8192"), ({"hit": hit} for hit in found), strict=False))

    tasks = {
        "longchat-lines": hits(1, 2, 3),
        "longchat-lines-of-8K": hits(4, 5),
        "kv-retrieval": hits(6, 7, 8),
        "kv-retrieval-of-8K": hits(9, 10),
        "perplexity": {str(1024 * n): {"perplexity": n + 0.5} for n in (1, 2, 4, 8)},
    }
    (tmp_path / "cream-seed1.json").write_text(json.dumps({"tasks": tasks}))
    old = {"perplexity": {"2048": {"perplexity": 1}}}
    (tmp_path / "plain-seed1.json").write_text(json.dumps({"tasks": old}))
    runs = read_runs(tmp_path)
    assert rivals(runs).splitlines()[2:] == ["| `cream` | 1 | 8 7 6 | 10 9 | 3 2 1 | 5 4 |"]
    assert price(runs).splitlines()[2:] == ["| `cream` | 1 | 1.5 2.5 4.5 8.5 |"]
    second = tasks | {"longchat-lines": hits(3, 2, 1)}
    (tmp_path / "cream-seed2.json").write_text(json.dumps({"tasks": second}))
    assert rivals(read_runs(tmp_path)).splitlines()[2].endswith("| 2 2 2 | 5 4 |")  # the mean


def test_several_gpus_share_the_variants(run):
    left, steps = run("--gpus", "3", "--only", "cream-seed1", "plain-seed1", "pose-seed1")
    assert left == 0 and len(steps) == len(set(steps)) == 6


def test_a_lane_scores_while_the_other_trains_and_never_trains_beside_it(run, study, monkeypatch):
    both, running, together = study.call, [], []

    def slow(arguments, log, gpu=None):
        kind = "train" if "megatron_cream.pretrain" in map(str, arguments) else log.stem
        running.append(kind)
        together.append(sorted(running))
        time.sleep(0.05)
        done = both(arguments, log, gpu)
        running.remove(kind)
        return done

    monkeypatch.setattr(study, "call", slow)
    names = ["cream-seed1", "plain-seed1", "pose-seed1"]
    left, steps = run("--lanes", "2", "--only", *names)
    assert left == 0 and len(steps) == len(set(steps)) == 6
    assert any("train" in kinds and "score-perplexity" in kinds for kinds in together)
    assert all(kinds.count("train") < 2 for kinds in together)


def test_retrieval_documents_of_other_questions_are_a_set_of_their_own(run, tmp_path):
    assert run("--only", "cream-seed1", "cream-questions-64-seed1")[0] == 0
    made = sorted(path.name for path in (tmp_path / "work").glob("retrieval*.idx"))
    assert made == ["retrieval-64.idx", "retrieval.idx"]


def test_a_run_that_fails_ends_the_study_and_says_why(run, capsys):
    only = ["--only", "cream-seed1", "plain-seed1"]
    left, steps = run(*only, fails="cream-seed1")
    assert left == 2 and steps == [("train", "cream-seed1")]
    assert "out of memory" in capsys.readouterr().out
    assert run(*only)[0] == 0


class TestRank:
    """LongPPL's order of models beside that of their retrieval."""

    def test_ranks_of_equal_values_are_their_mean(self, study):
        from rank import spearman

        assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
        # By hand: ranks 1.5 1.5 3 and 1 2 3, of which the correlation is sqrt(3) / 2.
        assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(3**0.5 / 2)

    def test_table(self, study, tmp_path):
        from rank import retrieval, table

        rows, found = {}, {}
        for i, name in enumerate(("a", "b", "c")):
            kept = {"needle": {"8192": {"hit": 10 * i}, "4096": {"hit": 1}}}
            (tmp_path / f"{name}.json").write_text(json.dumps({"tasks": kept}))
            rows[name] = {8192: {"longppl": 5.0 - i, "perplexity": 20.0 + i}}
            found[name] = retrieval(tmp_path / "runs" / name, tmp_path)
        lines = table(rows, found).splitlines()
        assert lines[2] == "| `a` | 5.000, 20.000, 0.0 |"
        assert lines[5] == "| rank correlation of LongPPL, of PPL | +1.00, -1.00 |"
        assert lines[-1] == "3 models; retrieval is the mean of needle"
        with pytest.raises(ValueError, match="neither .*d.json nor .*scores"):
            retrieval(tmp_path / "runs" / "d", tmp_path)
