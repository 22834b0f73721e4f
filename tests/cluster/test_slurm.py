# SPDX-License-Identifier: Apache-2.0
"""examples/slurm on a real Slurm of two nodes: stopped, requeued, gone on, COMPLETED, exported.

Run by ``make test-slurm``, not by ``make test``: it needs root and Slurm's daemons. Most of it
trains by a stand-in (trainer.py), which is quick; the last test is a newcomer's check, Megatron's.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import slurm

ROOT = Path(__file__).parents[2]
RUN = ROOT / "examples" / "slurm" / "run.sh"
SCRIPT = ROOT / "examples" / "slurm" / "tiny.sh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not())),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


class Job:
    """A job of the stand-in on two nodes."""

    def __init__(self, folder, environment, *flags, **variables):
        python = folder / "python"
        trainer = Path(__file__).with_name("trainer.py")
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {trainer} "$@"\n')
        python.chmod(0o755)
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").touch()
        (folder / "text.idx").touch()
        self.folder, self.log, self.signals = folder, folder / "job.log", 0
        self.environment = {**environment, "PYTHON": str(python), "WORK": str(folder), **variables}
        flags = ("--nodes=2", "--gpus-per-node=2", "--time=10", f"--output={self.log}", *flags)
        self.number = self.command("sbatch", "--parsable", *flags, RUN, SCRIPT).strip()

    def command(self, *words):
        done = subprocess.run(
            words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def state(self):
        shown = self.command("scontrol", "--oneliner", "show", "job", self.number)
        return re.search(r"JobState=(\w+)", shown)[1]

    def wait(self, reached, seconds=90):
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"{self.state()}\n{self.said()}"
            time.sleep(0.1)

    def wait_for(self, text, times=1):
        self.wait(lambda: self.said().count(text) >= times)

    def signal(self, *where):
        self.command("scancel", *where, "--signal=USR1", self.number)

    def end(self):
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.wait(lambda: self.state() in ended)
        return self.state()

    def exported(self):
        return (self.folder / "extended").is_dir()


@pytest.fixture
def job(tmp_path, environment):
    started = []

    def start(*flags, **variables):
        started.append(Job(tmp_path, environment, *flags, **variables))
        return started[-1]

    yield start
    for each in started:
        subprocess.run(["scancel", each.number], env=each.environment, check=False)


# To the batch script, as Slurm does when the time is nearly up; and to the steps, as scancel does.
@pytest.mark.parametrize("where", [["--batch"], []], ids=["batch", "steps"])
def test_it_is_requeued_every_time_and_completed(job, where):
    times = int(os.environ.get("REQUEUES", "2"))
    run = job(ITERATIONS=str(40 + 40 * times))
    for number in range(1, times + 1):
        run.wait_for("node 0 starts", number)
        run.wait_for("node 1 starts", number)
        time.sleep(1)
        run.signal(*where)
        run.wait_for("back into the queue", number)
    assert run.end() == "COMPLETED", run.said()
    assert run.exported()
    starts = [int(text) for text in re.findall(r"node 0 starts at iteration (\d+)", run.said())]
    assert len(starts) == times + 1
    assert starts[0] == 0 and starts == sorted(set(starts)), "each went on from the one before"
    assert "--nproc-per-node" not in run.said() and not list(run.folder.glob("*.stopped"))


@pytest.mark.parametrize("step", ["import", "export"])
@pytest.mark.parametrize("where", [["--batch"], []], ids=["batch", "steps"])
def test_a_signal_lets_a_short_import_or_export_finish(job, step, where):
    run = job(ITERATIONS="5", **{f"{step.upper()}_SECONDS": "3"})
    run.wait_for(f"{step} begins")
    run.signal(*where)
    assert run.end() == "COMPLETED", run.said()
    assert run.exported()
    assert run.said().count(f"{step} begins") == run.said().count(f"{step} ends") == 1


def test_a_signal_stops_a_long_import_which_is_made_anew(job):
    run = job(ITERATIONS="5", IMPORT_SECONDS="8", SIGNAL_SECONDS="1")
    run.wait_for("import begins")
    run.signal("--batch")
    assert run.end() == "COMPLETED", run.said()
    assert run.exported()
    assert run.said().count("import begins") == 2 and run.said().count("import ends") == 1


def test_what_fails_or_is_cancelled_is_not_requeued(job):
    run = job(ITERATIONS="5", PYTHON="/bin/false")
    assert run.end() == "FAILED"
    assert "back into the queue" not in run.said()


def test_a_crash_is_started_again_in_the_same_job(job):
    run = job(ITERATIONS="40", CRASHING="once")
    assert run.end() == "COMPLETED", run.said()
    assert run.exported() and "back into the queue" not in run.said()
    assert run.said().count("node 1 starts") == 2 and run.said().count("node 0 starts") == 1
    assert "crash 1, exit status 1: going on from iteration 0" in run.said()


def test_a_run_that_crashes_at_the_same_place_ends(job):
    run = job(ITERATIONS="40", CRASHING="always")
    assert run.end() == "FAILED", run.said()
    assert run.said().count("crashed twice since the checkpoint of iteration 0") == 2, "each node"
    assert run.said().count("node 0 starts") == 2 and "back into the queue" not in run.said()


def test_scancel_is_the_end(job):
    run = job(ITERATIONS="1000")
    run.wait_for("node 1 starts")
    run.command("scancel", run.number)
    assert run.end() == "CANCELLED"
    time.sleep(5)
    assert run.state() == "CANCELLED" and "back into the queue" not in run.said()


def test_a_newcomers_check_says_that_the_cluster_works(tmp_path, environment):
    """Megatron itself, two nodes of a process each."""
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm" / "check.sh"],
        env={**environment, "PYTHON": sys.executable, "WORK": str(tmp_path / "check")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED after 1 requeues" in done.stdout
    assert (tmp_path / "check" / "extended" / "config.json").is_file()
    saved = re.search(r"saved at iteration (\d+)", done.stdout)[1]
    log = (tmp_path / "check" / "job.log").read_text()
    assert re.search(rf"successfully loaded checkpoint from .*/run .*at iteration {saved}\b", log)
