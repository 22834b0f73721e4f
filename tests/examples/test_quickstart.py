# SPDX-License-Identifier: Apache-2.0
"""The quickstart's five commands as they are printed, small, on two CPU cores."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.launch import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"


def start(*arguments, script="run.sh", **variables):
    return subprocess.run(
        ["bash", str(QUICKSTART / script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, quick_python):
    work = tmp_path_factory.mktemp("smoke")
    done = start("--smoke", WORK=str(work), PYTHON=quick_python)
    assert done.returncode == 0, done.stderr[-4000:]
    return work, done


def test_five_commands_were_printed_and_run(smoke):
    work, done = smoke
    tools = re.findall(
        r"^\$ \S+ (?:\S+/tools/(\w+)\.py|-m (torch\.distributed\.run))", done.stderr, re.M
    )
    names = [tool or module for tool, module in tools]
    assert names == [
        *("convert_checkpoint", "preprocess_data", "torch.distributed.run"),
        *("convert_checkpoint", "evaluate"),
    ]
    assert (work / "perplexity" / "table.md").read_text().strip() in done.stdout


def test_it_ends_in_a_model_of_the_longer_window(smoke):
    work, _ = smoke
    before = json.loads((work / "tiny" / "config.json").read_text())
    after = json.loads((work / "extended" / "config.json").read_text())
    assert (before["max_position_embeddings"], after["max_position_embeddings"]) == (64, 256)
    assert after["rope_parameters"]["rope_type"] == "yarn"
    assert after["rope_parameters"]["factor"] == 4
    result = json.loads((work / "perplexity" / "result.json").read_text())
    assert "256" in json.dumps(result)


def test_it_trained(smoke):
    _, done = smoke
    losses = [float(x) for x in re.findall(r"lm loss: (\S+)", done.stdout)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.02


def test_nothing_is_done_twice(smoke):
    work, _ = smoke
    again = start("--smoke", WORK=str(work))
    assert again.returncode == 0
    assert len(re.findall(r" is there$", again.stderr, re.M)) == 5
    assert "$" not in again.stderr


@pytest.mark.parametrize("script", ["run.sh", "compare.sh"])
@pytest.mark.parametrize("missing", ["HF", "TEXT", "HELD_OUT"])
def test_what_must_be_given(missing, script, tmp_path):
    given = {"HF": "m", "TEXT": "t", "HELD_OUT": "h"}
    done = start(script=script, WORK=str(tmp_path / "work"), **{**given, missing: ""})
    assert done.returncode != 0 and f"{missing}: is not set: it must be" in done.stderr
    assert not (tmp_path / "work").exists()


LENGTHS = {"WINDOW": "64", "TARGET": "256", "LENGTHS": "192 256"}


@pytest.fixture(scope="module")
def compared(smoke, tmp_path_factory, quick_python):
    """compare.sh over a way that is trained already."""
    done = smoke[0]
    work = tmp_path_factory.mktemp("compared")
    way = work / "cream-yarn-1e-3"
    way.mkdir()
    for name in ("run", "extended"):
        (way / name).symlink_to(done / name)
    for name in ("base", "text.idx"):
        (work / name).symlink_to(done / name)
    given = {"HF": str(done / "tiny"), "TEXT": str(ROOT / "docs"), "WORK": str(work)}
    given |= {"HELD_OUT": str(ROOT / "README.md"), "DOCUMENTS": "1", "DTYPE": "float32"}
    given["PYTHON"] = quick_python
    way = "cream:yarn:1e-3"
    return work, start(way, script="compare.sh", **LENGTHS, **given)


def test_ways_are_compared_with_the_model_before(compared):
    work, done = compared
    assert done.returncode == 0, done.stderr[-4000:]
    for task in ("perplexity", "passkey", "needle"):
        folder = work / "compare" / task
        assert {"picture.png", "table.md"} <= {path.name for path in folder.iterdir()}
        rows = (folder / "table.md").read_text().splitlines()
        names = [row.split("|")[1].strip() for row in rows[-3:]]
        assert names == ["before", "untrained-yarn", "cream-yarn-1e-3"]


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ([], "no way is given: each must be METHOD:ROPE:LR"),
        (["cream:yarn"], "a way is 'cream:yarn': it must be METHOD:ROPE:LR"),
        (["cream:yarn:1e-4", "dream:yarn:1e-4"], "METHOD of dream:yarn:1e-4 is 'dream'"),
        (["cream:dynamic:1e-4"], "ROPE of cream:dynamic:1e-4 is 'dynamic': it must be one of"),
        (["cream:yarn:4"], "LR of cream:yarn:4 is '4': it must be a number above 0 and below 1"),
        (["cream:yarn:1e-4"] * 2, "the way cream:yarn:1e-4 is given twice"),
    ],
)
def test_what_a_way_must_be(ways, said, tmp_path):
    given = {"HF": "m", "TEXT": "t", "HELD_OUT": "h", "WORK": str(tmp_path / "work")}
    done = start(*ways, script="compare.sh", **given)
    assert done.returncode == 2 and f"error: {said}" in done.stderr
    assert not (tmp_path / "work").exists()
