# SPDX-License-Identifier: Apache-2.0
"""The trainer with an attention factor: in the softmax scale or on part of the dimensions."""

import pytest
from support import ranks

YARN = ["--rope-interpolation", "yarn", "--rope-options", "attention_factor=1.5"]
PARTIAL = ["--rotary-percent", "0.5", "--rotary-interleaved"]
SHORT = ["--train-iters", "3", "--eval-iters", "0"]
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.fixture
def train(tmp_path, flags):
    def run(name, *extra, processes=1):
        return ranks.train(tmp_path / name, [*flags, *SHORT, *extra], processes)

    return run


@pytest.mark.parametrize("partial", [[], PARTIAL], ids=["whole", "partial"])
def test_losses_do_not_depend_on_the_layout(train, tmp_path, partial):
    save = ["--save", str(tmp_path / "weights"), "--save-interval", "1", "--train-iters", "1"]
    train("first", *partial, *save)
    start = ["--pretrained-checkpoint", str(tmp_path / "weights"), *partial]
    alone = train("alone", *start, *YARN)
    split = train("split", *start, *YARN, *LAYOUT, processes=4)
    assert alone.losses.keys() == split.losses.keys() == {1, 2, 3}
    for iteration, loss in alone.losses.items():
        assert split.losses[iteration] == pytest.approx(loss, abs=1e-5)
    (line,) = alone.lines("attention factor")
    assert line.endswith("1.5, on the rotated dimensions" if partial else "in the softmax scale")
    other = train("other", *start, "--rope-interpolation", "yarn")
    assert abs(other.losses[3] - alone.losses[3]) > 1e-4, "the factor is not felt"
