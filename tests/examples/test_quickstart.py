# SPDX-License-Identifier: Apache-2.0
"""The quickstart's commands as they are printed, small, on two CPU cores; and ways compared."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.launch import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = ["preprocess", "preprocess", "import", "evaluate", "pretrain", "export", "evaluate"]


def start(*arguments, script="smoke.sh", **variables):
    return subprocess.run(
        ["bash", str(QUICKSTART / script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, quick_python):
    work = tmp_path_factory.mktemp("smoke")
    done = start(WORK=str(work), PYTHON=quick_python)
    assert done.returncode == 0, done.stderr[-4000:]
    return work, done


def ran(done):
    """The commands that were printed, by name."""
    lines = re.findall(r"^\$ (python .*)$", done.stderr, re.M)
    return [re.search(r"megatron_cream[ .](\w+)", line)[1] for line in lines]


def test_every_command_was_printed_and_run(smoke):
    work, done = smoke
    assert ran(done) == STEPS
    assert (work / "extended" / "report.html").exists()
    assert f"report: {work}/extended/report.html" in done.stdout


def test_it_ends_in_a_model_of_the_longer_window(smoke):
    work, _ = smoke
    before = json.loads((work / "tiny" / "config.json").read_text())
    after = json.loads((work / "extended" / "config.json").read_text())
    assert (before["max_position_embeddings"], after["max_position_embeddings"]) == (64, 256)
    assert after["rope_parameters"]["rope_type"] == "yarn"
    assert after["rope_parameters"]["factor"] == 4
    scored = work / "extended.work" / "after" / "perplexity" / "result.json"
    assert [row["length"] for row in json.loads(scored.read_text())["lengths"]] == [
        32,
        64,
        128,
        256,
    ]


def test_it_trained(smoke):
    log = (smoke[0] / "extended.work" / "logs" / "train.log").read_text()
    losses = [float(x) for x in re.findall(r"lm loss: (\S+)", log)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.02


def test_nothing_is_done_twice(smoke, quick_python):
    again = start(WORK=str(smoke[0]), PYTHON=quick_python)
    assert again.returncode == 0
    assert len(re.findall(r" is there$", again.stderr, re.M)) == len(STEPS)
    assert not ran(again)


@pytest.mark.parametrize("missing", ["HF", "TEXT", "HELD_OUT", "TARGET"])
def test_what_must_be_given(missing, tmp_path):
    given = {"HF": "m", "TEXT": "t", "HELD_OUT": "h", "TARGET": "256"}
    done = start(script="compare.sh", WORK=str(tmp_path / "work"), **{**given, missing: ""})
    assert done.returncode != 0 and f"{missing}: is not set: it must be" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.fixture(scope="module")
def compared(smoke, tmp_path_factory, quick_python):
    """compare.sh over two ways that are trained and scored already, but for the last step."""
    done = smoke[0]
    work = tmp_path_factory.mktemp("compared")
    given = {"HF": str(done / "tiny"), "TEXT": str(ROOT / "docs"), "WORK": str(work)}
    given |= {"HELD_OUT": str(ROOT / "README.md"), "TARGET": "256", "PYTHON": quick_python}
    given["EXTEND_ARGS"] = (
        "--cpu --steps 1 --global-batch-size 2 --micro-batch-size 2 --retrieval-share 0 "
        "--lengths 192 256 --cases 1"
    )
    return work, start("cream:yarn:1e-3", "pose:yarn:1e-3", script="compare.sh", **given)


@pytest.mark.slow
def test_ways_are_compared_with_the_model_before(compared):
    work, done = compared
    assert done.returncode == 0, done.stderr[-4000:]
    assert (work / "pose-yarn-1e-3.work" / "base").is_symlink()  # the first way's, made once
    assert ran(done) == ["import", "preprocess", "preprocess", *STEPS[3:], *STEPS[4:]]
    for task in ("perplexity", "passkey", "needle"):
        folder = work / "compare" / task
        assert {"picture.png", "table.md"} <= {path.name for path in folder.iterdir()}
        rows = (folder / "table.md").read_text().splitlines()
        names = [row.split("|")[1].strip() for row in rows[-3:]]
        assert names == ["tiny", "cream-yarn-1e-3", "pose-yarn-1e-3"]


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ([], "no way is given: each must be METHOD:ROPE:LR"),
        (["cream:yarn"], "--lr"),
        (["dream:yarn:1e-4"], "dream"),
        (["cream:dynamic:1e-4"], "dynamic"),
    ],
)
def test_what_a_way_must_be(ways, said, tmp_path, quick_python):
    given = {"HF": "m", "TEXT": "t", "HELD_OUT": "h", "TARGET": "256", "PYTHON": quick_python}
    done = start(*ways, script="compare.sh", WORK=str(tmp_path / "work"), **given)
    assert done.returncode == 2 and "error: " in done.stderr and said in done.stderr
    assert not (tmp_path / "work").exists()
