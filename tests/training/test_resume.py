# SPDX-License-Identifier: Apache-2.0
"""A run that is killed goes on as if it had not been."""

import random
import time

import pytest
from support import ranks

TRACKER = "latest_checkpointed_iteration.txt"
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


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
    return [*others, *mixed, "--num-workers", "2", "--train-iters", "10"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, blend):
    return ranks.train(tmp_path_factory.mktemp("whole"), blend)


@pytest.fixture(scope="module")
def from_initial(tmp_path_factory, blend, initial):
    """The same from weights that every layout can start from."""
    start = ["--pretrained-checkpoint", initial]
    return ranks.train(tmp_path_factory.mktemp("initial"), [*blend, *start])


def after(iteration, delay=0.0):
    """True ``delay`` seconds after the loss of an iteration is written."""
    reached = []

    def when(losses):
        if iteration in losses and not reached:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + delay

    return when


def inside_checkpoint(folder, iteration):
    """True while a checkpoint is being written: its folder is there, the tracker names another."""
    tracker, begun = folder / TRACKER, folder / f"iter_{iteration:07d}"

    def when(losses):
        named = tracker.read_text().strip() if tracker.exists() else ""
        return begun.exists() and named != str(iteration)

    return when


def kill_and_restart(tmp_path, flags, kill_when, before=(1, []), then=(1, [])):
    """Run until killed, restart from its checkpoints; (ranks, layout flags) of each part."""
    folder = str(tmp_path / "checkpoint")
    run = [*flags, "--save", folder, "--load", folder, "--save-interval", "2"]
    first = ranks.train(tmp_path / "a", [*run, *before[1]], before[0], kill_when=kill_when)
    assert set(first.status) == {-9}, "killed before it was done"
    second = ranks.train(tmp_path / "b", [*run, *then[1]], then[0])
    assert max(second.losses) == 10
    assert set(first.losses) | set(second.losses) == set(range(1, 11))
    return first, second


@pytest.mark.parametrize("kill_after", [1, 4, 5])
def test_between_checkpoints_is_bit_identical(kill_after, tmp_path, blend, uninterrupted):
    first, second = kill_and_restart(tmp_path, blend, after(kill_after))
    assert first.losses | second.losses == uninterrupted.losses
    whole = (kill_after - 1) // 2 * 2  # the last checkpoint that was surely finished
    assert whole < min(second.losses) <= max(first.losses) + 1


@pytest.mark.parametrize("iteration", [2, 6])
def test_during_a_checkpoint_is_bit_identical(iteration, tmp_path, blend, uninterrupted):
    folder = tmp_path / "checkpoint"
    first, second = kill_and_restart(tmp_path, blend, inside_checkpoint(folder, iteration))
    assert first.losses | second.losses == uninterrupted.losses
    assert min(second.losses) == iteration - 1, "the half-written one is not resumed from"


@pytest.mark.parametrize("attempt", range(2))
def test_at_a_random_moment_is_bit_identical(attempt, tmp_path, blend, uninterrupted):
    iteration, delay = random.randint(1, 7), random.uniform(0, 0.1)
    print(f"killed {delay:.3f} s after iteration {iteration}")  # shown where the test fails
    first, second = kill_and_restart(tmp_path, blend, after(iteration, delay))
    assert first.losses | second.losses == uninterrupted.losses


@pytest.mark.parametrize(
    ("before", "then"),
    [((1, []), (2, TP2)), ((2, TP2), (2, PP2)), ((2, PP2), (2, []))],
    ids=["one rank to TP2", "TP2 to PP2", "PP2 to DP2"],
)
def test_on_another_layout_goes_on_alike(before, then, tmp_path, blend, initial, from_initial):
    start = [*blend, "--pretrained-checkpoint", initial]
    iteration = random.randint(3, 7)
    print(f"killed after iteration {iteration}")
    first, second = kill_and_restart(tmp_path, start, after(iteration), before, then)
    both = first.losses | second.losses
    assert max(abs(both[i] - from_initial.losses[i]) for i in both) < 1e-5
