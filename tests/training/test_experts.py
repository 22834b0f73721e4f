# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism does not change the result of a small mixture of experts."""

import pytest
from support import ranks

MOE = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "96"),
    *("--moe-token-dispatcher-type", "allgather", "--moe-router-load-balancing-type", "none"),
    "--disable-bias-linear",
]
EP2 = ["--expert-model-parallel-size", "2"]
LAYOUTS = {
    "EP2": (2, EP2),
    "EP2 x PP2, distributed optimizer": (
        4,
        [*EP2, "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"],
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory, flags):
    """Flags that start every layout from the same weights."""
    folder = tmp_path_factory.mktemp("experts")
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "1", "--train-iters", "1"]
    ranks.train(folder, [*flags, *MOE, *save, "--eval-iters", "0"])
    return [*flags, *MOE, "--pretrained-checkpoint", str(folder / "checkpoint")]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, start):
    return ranks.train(tmp_path_factory.mktemp("one"), start)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_as_one_rank(name, tmp_path, start, one_rank):
    count, layout = LAYOUTS[name]
    run = ranks.train(tmp_path, [*start, *layout], count)
    assert sorted(run.losses) == sorted(one_rank.losses)
    assert max(abs(run.losses[i] - one_rank.losses[i]) for i in run.losses) < 1e-5
