# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one line and status 2; a bug keeps its traceback."""

import errno
import os
import subprocess
import sys

import pytest

from megatron_cream.errors import MissingPackageError, UserError, one_line_errors


@pytest.mark.parametrize(
    "error",
    [
        UserError("--lengths is 0:\n it must be at least 1"),
        MissingPackageError("--hf needs transformers"),
        FileNotFoundError(2, "No such file or directory", "data.idx"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, error):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: " + " ".join(str(error).split()) + "\n"


@pytest.mark.parametrize("error", [ValueError, AssertionError, RuntimeError, KeyError, ImportError])
def test_a_bug_keeps_its_traceback(capsys, error):
    with pytest.raises(error), one_line_errors():
        raise error("inside")
    assert capsys.readouterr().err == ""


def test_another_rank_waits_for_the_first_and_says_which_it_is(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("megatron_cream.errors.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError("--lengths is 0: it must be at least 1")
    assert stop.value.code == 2 and waited[0] > 1
    assert capsys.readouterr().err == "error: rank 3: --lengths is 0: it must be at least 1\n"


PRINTS = """
from megatron_cream.errors import one_line_errors
with one_line_errors():
    print("a line\\n" * {lines})
    {then}
"""


@pytest.mark.parametrize("lines", [1, 100_000])  # left in the buffer to the end; more than it holds
@pytest.mark.parametrize("then", ["pass", "raise SystemExit(0)"])
def test_a_reader_that_goes_is_no_error(lines, then):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTS.format(lines=lines, then=then)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(capfd):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert stop.value.code == 2
    assert capfd.readouterr().err == "error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_is_told_by_one_rank_and_repeated_by_torchrun(rank, monkeypatch, capsys, tmp_path):
    import json

    from megatron_cream import errors

    waited, report = [], tmp_path / "error.json"
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(SystemExit) as ended, errors.one_line_errors():
        raise UserError("--lr is\n-1: it must be at least 0")
    said = "error: rank 2: " if rank else "error: "
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{said}--lr is -1: it must be at least 0\n"
    assert bool(waited) == bool(rank), "the others leave it to rank 0, which ends them"
    assert json.loads(report.read_text())["message"].startswith(f"{said}--lr")
