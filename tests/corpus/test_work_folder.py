# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from megatron_cream.corpus import storage as module
from megatron_cream.corpus.storage import SUFFIXES

OLD_NAMES = ("data.old.idx", "data.old.json", "data.old.bin")
WRITTEN = (".bin", ".json", ".idx")


@pytest.mark.parametrize(
    ("older", "failing"),
    [(older, "a.b" + suffix) for older in (False, True) for suffix in WRITTEN]
    + [(True, name) for name in OLD_NAMES],
)
def test_failure_while_moving_into_place(job, monkeypatch, older, failing, run, outputs, left_in):
    if older:
        run(job)
    before = left_in(job), older and outputs(job.output_prefix)
    true_rename = os.rename

    def rename(source, target):
        # Putting an older file back must work, as it would after a passing failure.
        if os.path.basename(target) == failing and os.path.basename(source) not in OLD_NAMES:
            raise KeyboardInterrupt
        true_rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", rename)
        run(job, append_eod=True, overwrite=older)
    assert older is False or outputs(job.output_prefix) == before[1]
    assert left_in(job) == [*before[0], "a.b.parts"]
    run(job, append_eod=True, overwrite=older)
    assert left_in(job) == ["a.b.bin", "a.b.idx", "a.b.json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moves", range(6))
def test_killed_while_moving_into_place(job, tmp_path, monkeypatch, older, moves, run, outputs):
    """The next start goes on from what a process leaves that ends at its n-th move."""
    if older:
        run(job)
    wanted = tmp_path / "out" / "wanted"
    run(job, append_eod=True, output_prefix=str(wanted))
    true_rename, left = os.rename, moves

    def rename(source, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        true_rename(source, target)

    def killed(*arguments):
        raise Killed

    if moves < (6 if older else 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "rename", rename)
            patch.setattr(module, "_restore", killed)
            run(job, append_eod=True, overwrite=older)
        assert os.path.exists(job.output_prefix + ".parts/data.whole")
    run(job, append_eod=True, overwrite=older)
    assert outputs(job.output_prefix) == outputs(wanted)
    assert not os.path.exists(job.output_prefix + ".parts")


def test_overwrite_replaces_all_files(job, run, outputs, left_in):
    run(job)
    before = outputs(job.output_prefix)
    run(job, append_eod=True, overwrite=True)
    after = outputs(job.output_prefix)
    assert all(after[suffix] != before[suffix] for suffix in WRITTEN)
    assert left_in(job) == ["a.b.bin", "a.b.idx", "a.b.json"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_output_needs_overwrite(job, suffix, run):
    Path(job.output_prefix + suffix).write_text("older")
    with pytest.raises(ValueError, match=rf"--output-prefix .*a\.b\{suffix} exists, needs a new"):
        run(job)
    assert Path(job.output_prefix + suffix).read_text() == "older"
