# SPDX-License-Identifier: Apache-2.0
"""The block at start: what it counts is what the run will train."""

from argparse import Namespace

import pytest

from megatron_cream.config import ExtensionConfig
from megatron_cream.positions.coverage import coverage

pytestmark = pytest.mark.usefixtures("cpu_megatron")

RUN = {"train_iters": None, "train_samples": None, "global_batch_size": 4}


@pytest.mark.parametrize(
    ("run", "samples", "said"),
    [
        ({"train_iters": 3}, 12, "in all 12 samples"),
        ({"train_samples": 7}, 7, "in all 7 samples"),
        ({"train_samples": 9, "train_iters": 3}, 9, "in all 9 samples"),
        ({"train_iters": 30}, 20, "in the first 20 of 120 samples"),
    ],
)
def test_distances_are_those_of_the_samples_of_the_run(monkeypatch, run, samples, said):
    from megatron_cream.training import start_block

    monkeypatch.setattr(start_block, "_SAMPLES", 20)
    extension = ExtensionConfig(96, 768, 96, position_strategy="cream", position_seed=3)
    line = start_block._coverage_line(Namespace(**{**RUN, **run}), extension)
    share = coverage(extension.strategy(), samples, 3).covered
    assert line.startswith(f"{100 * share:.1f} % of 1..T-1 {said}")


def test_a_strategy_without_chunks_is_counted_over_fewer(monkeypatch):
    from megatron_cream.training import start_block

    extension = ExtensionConfig(96, 768, 96, position_strategy="randpos")
    assert start_block.most_samples(extension.strategy()) == start_block._DENSE_SAMPLES
    args = Namespace(**{**RUN, "train_iters": 1000})
    assert (
        f"in the first {start_block._DENSE_SAMPLES} of 4000 samples"
        in start_block._coverage_line(args, extension)
    )


def test_a_strategy_of_many_chunks_is_counted_over_some():
    from megatron_cream.training.start_block import _SAMPLES, most_samples

    found = {
        name: most_samples(ExtensionConfig(96, 768, 96, position_strategy=name).strategy())
        for name in ("cream", "pose", "scatter")
    }
    assert found["cream"] == found["pose"] == _SAMPLES and 500 < found["scatter"] < 10_000


@pytest.mark.parametrize(
    ("rotary_percent", "said"), [(1.0, "in the softmax scale"), (0.5, "on the rotated dimensions")]
)
def test_where_the_attention_factor_is(rotary_percent, said):
    from megatron_cream.mcore.argument_table import rotary_dim
    from megatron_cream.training import start_block

    args = Namespace(
        kv_channels=None, hidden_size=256, num_attention_heads=4, rotary_percent=rotary_percent
    )
    extension = ExtensionConfig(96, 768, 96, rope_interpolation="yarn", rope_factor=8.0)
    scaling = extension.scaling(rotary_dim(args))
    assert start_block._attention_factor_line(args, scaling) == f"1.20794, {said}"
