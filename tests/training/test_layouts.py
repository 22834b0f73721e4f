# SPDX-License-Identifier: Apache-2.0
"""The layout of a run does not change its result, in Megatron's real trainer over gloo."""

import pytest
from support import ranks
from support.ranks import largest_difference

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "PP4 (two middle stages)": (4, ["--pipeline-model-parallel-size", "4"]),
    "PP2, two virtual stages each": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2": (2, []),
    "DP2, distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "micro-batch 2": (1, ["--micro-batch-size", "2"]),
    "micro-batch 4, recompute all": (
        1,
        [
            *("--micro-batch-size", "4", "--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ],
    ),
    "recompute attention": (1, ["--recompute-granularity", "selective"]),
    "TP2 x PP2 x DP2": (8, [*TP2, *PP2, "--use-distributed-optimizer"]),
}


@pytest.fixture(scope="module")
def record_difference():
    """Collects differences and prints them as one table at the end (pytest -s shows it)."""
    rows = []

    def add(name, difference):
        rows.append((name, difference))
        return difference

    yield add
    print("\n| layout | largest difference of a loss |\n|---|---|")
    for name, difference in rows:
        print(f"| {name} | {difference:.1e} |")


def test_the_model_learns(tmp_path, flags):
    losses = ranks.train(tmp_path, [*flags, "--train-iters", "10"]).losses
    assert sorted(losses) == list(range(1, 11))
    assert losses[10] < losses[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_as_one_rank(name, tmp_path, flags, initial, reference, record_difference):
    count, layout = LAYOUTS[name]
    run = ranks.train(tmp_path, [*flags, "--pretrained-checkpoint", initial, *layout], count)
    difference = record_difference(name, largest_difference(run.losses, reference.losses))
    assert difference < 1e-5


def test_positions_matter(tmp_path, flags, initial, reference):
    """The parity above would hold, too, if nobody looked at angles. Same text, other angles."""
    other = ["--rope-factor", "16"]
    run = ranks.train(tmp_path, [*flags, "--pretrained-checkpoint", initial, *other])
    assert largest_difference(run.losses, reference.losses) > 1e-4


def test_saved_at_tp2_resumed_at_pp2(tmp_path, flags, initial, reference):
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "3"]
    start = ["--load", str(tmp_path / "checkpoint"), "--pretrained-checkpoint", initial]
    first = ["--tensor-model-parallel-size", "2", "--exit-interval", "3"]
    second = ["--pipeline-model-parallel-size", "2"]
    before = ranks.train(tmp_path / "a", [*flags, *save, *start, *first], 2, wait=False)
    after = ranks.train(tmp_path / "b", [*flags, *save, *start, *second], 2)
    assert sorted(before.losses) == [1, 2, 3]
    assert sorted(after.losses) == [4, 5, 6]
    assert largest_difference(before.losses | after.losses, reference.losses) < 1e-5
