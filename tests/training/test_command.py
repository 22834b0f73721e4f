# SPDX-License-Identifier: Apache-2.0
"""The command as a user types it, torchrun and all."""

import subprocess

import pytest
from support import ranks
from support.runs import ITERATIONS

from megatron_cream import torchrun


@pytest.fixture(scope="module")
def command(quick_python):
    """Runs torchrun; the wheel's test of ``check-install`` has it with Python's own imports."""

    def call(flags, processes=1):
        line = torchrun.command(processes, "-m", "megatron_cream.pretrain", "--cpu", *flags)
        environment = torchrun.environment(PYTHON=quick_python)
        return subprocess.run(
            [quick_python, *line[1:]], env=environment, capture_output=True, text=True, timeout=240
        )

    return call


def test_torchrun_trains_and_says_what_it_does(command, flags):
    done = command([*flags, "--train-iters", "2"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "trained window N   96 tokens",
        "target window T    768 tokens, 8 x N",
        "positions          cream, seed 1234",
        "rope               yarn, factor 8 over 96 tokens, theta 10000",
        "rope kernel        unfused",
        "samples from: window",
        "tokens read        ",
    ):
        assert line in done.stdout
    assert done.stdout.count("lm loss:") >= 2


def test_start_block_names_the_holes(tmp_path, flags):
    narrow = ["--cream-sigma", "0.1", "--cream-head-lengths", "8", "--train-iters", "1"]
    run = ranks.train(tmp_path, [*flags, *narrow])
    (line,) = run.lines("distances trained")
    assert ", never " in line


def test_bad_input_is_one_line(command, flags):
    done = command([*flags, "--target-length", "90"])
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--target-length" in errors[0]
    assert "iteration" not in done.stdout
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-2]
    assert last == f"traceback : {errors[0]}", "torchrun's own report is forty lines"


def test_printed_losses_are_those_of_their_own_iterations(reference):
    """Megatron's line of the second iteration after a start would be the mean of two."""
    import re

    lines = reference.lines("lm loss:")
    printed = [float(re.search(r"lm loss: (\S+)", line)[1]) for line in lines]
    assert printed == pytest.approx(list(reference.losses.values()), rel=1e-5)
    assert len(set(printed)) == ITERATIONS
