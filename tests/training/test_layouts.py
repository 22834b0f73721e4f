# SPDX-License-Identifier: Apache-2.0
"""The layout of a run does not change its result, in Megatron's real trainer over gloo."""

import pytest
from support import ranks

LAYOUTS = {
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "PP4 (two middle stages)": (4, ["--pipeline-model-parallel-size", "4"]),
    "DP2": (2, []),
    "DP2, distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "micro-batch 2": (1, ["--micro-batch-size", "2"]),
}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(abs(a[i] - b[i]) for i in a)


def test_reference_learns(reference):
    assert sorted(reference.losses) == list(range(1, 11))
    assert reference.losses[10] < reference.losses[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_as_one_rank(name, tmp_path, flags, initial, reference):
    count, layout = LAYOUTS[name]
    run = ranks.train(tmp_path, [*flags, "--pretrained-checkpoint", initial, *layout], count)
    assert largest_difference(run.losses, reference.losses) < 1e-5


def test_positions_matter(tmp_path, flags, initial, reference):
    """The parity above would hold, too, if nobody looked at position ids."""
    other = ["--position-seed", "99"]
    run = ranks.train(tmp_path, [*flags, "--pretrained-checkpoint", initial, *other])
    assert largest_difference(run.losses, reference.losses) > 1e-4


def test_saved_at_tp2_resumed_at_pp2(tmp_path, flags, initial, reference):
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "5"]
    start = ["--load", str(tmp_path / "checkpoint"), "--pretrained-checkpoint", initial]
    first = ["--tensor-model-parallel-size", "2", "--exit-interval", "5"]
    second = ["--pipeline-model-parallel-size", "2"]
    before = ranks.train(tmp_path / "a", [*flags, *save, *start, *first], 2, wait=False)
    after = ranks.train(tmp_path / "b", [*flags, *save, *start, *second], 2)
    assert sorted(before.losses) == [1, 2, 3, 4, 5]
    assert sorted(after.losses) == [6, 7, 8, 9, 10]
    assert largest_difference(before.losses | after.losses, reference.losses) < 1e-5
