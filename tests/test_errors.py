# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one line and status 2; a bug keeps its traceback."""

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
