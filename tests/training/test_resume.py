# SPDX-License-Identifier: Apache-2.0
"""A run that is killed goes on as if it had not been."""

import pytest
from support import ranks


@pytest.fixture(scope="module")
def blend(flags, tmp_path_factory):
    """Flags of a run over a blend of two datasets, several epochs of each, with data workers."""
    from support.runs import write_dataset

    folder = tmp_path_factory.mktemp("blend")
    first = write_dataset(folder / "a", [300, 500, 900, 800], seed=3)
    second = write_dataset(folder / "b", [400, 700, 1000], seed=4)
    position = flags.index("--data-path")
    others = flags[:position] + flags[position + 2 :]
    mixed = ["--data-path", "0.3", first, "0.7", second, "--split", "100,0,0", "--eval-iters", "0"]
    return [*others, *mixed, "--num-workers", "2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, blend):
    return ranks.train(tmp_path_factory.mktemp("whole"), blend)


@pytest.mark.parametrize("kill_after", [2, 4, 5])
def test_killed_and_restarted_is_bit_identical(kill_after, tmp_path, blend, uninterrupted):
    """SIGKILL once the loss is there: at even iterations that is when a checkpoint is written."""
    save = ["--save", str(tmp_path / "checkpoint"), "--load", str(tmp_path / "checkpoint")]
    run = [*blend, *save, "--save-interval", "2"]
    before = ranks.train(tmp_path / "a", run, kill_after=kill_after)
    assert before.status == [-9]
    assert len(before.losses) < 10
    after = ranks.train(tmp_path / "b", run)
    assert max(after.losses) == 10
    assert before.losses | after.losses == uninterrupted.losses
    whole = (kill_after - 1) // 2 * 2  # the last checkpoint that was surely finished
    assert whole < min(after.losses) <= max(before.losses) + 1
