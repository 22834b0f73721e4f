# SPDX-License-Identifier: Apache-2.0
"""Every target once, at every length; and a checkpoint scores what the trainer computed."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.evaluation.perplexity import cost, perplexity, windows


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 200))
def test_every_target_counts_once(length, stride, more):
    stride = min(stride, length)
    tokens = length + 1 + more
    targets = []
    for window in windows(tokens, length, stride):
        assert window.length == length
        assert 0 <= window.start <= tokens - 1 - length
        last = window.start + length
        targets += range(last - window.scored + 1, last + 1)
    assert targets == list(range(1, tokens))


@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 9), (20, 4)])
def test_refuses_what_would_skip_targets(length, stride):
    with pytest.raises(ValueError, match="--stride|too short"):
        windows(20, length, stride)


class Copycat(torch.nn.Module):
    """Loss of a target: its token id, plus 1000 where it was not given with its context."""

    def __init__(self, length):
        super().__init__()
        self.length = length
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, position_ids, attention_mask, labels):
        assert input_ids.shape[1] == self.length
        assert torch.equal(position_ids[0], torch.arange(self.length))
        assert torch.equal(input_ids[:, 1:], labels[:, :-1])
        return labels.float()


@pytest.mark.parametrize("length", [4, 16, 49])
def test_mean_over_targets_and_error_over_documents(length):
    documents = [np.arange(50) * scale for scale in (1, 2, 5)]
    seen = []
    found = perplexity(Copycat(length), documents, length, max(1, length // 2), 32, seen.append)
    means = [25.0, 50.0, 125.0]  # targets 1 .. 49
    assert found.nll == pytest.approx(np.mean(means))
    assert found.targets == 3 * 49
    assert found.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert sum(seen) == cost(documents, length, max(1, length // 2))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    def make(**changes):
        defaults = {
            "lengths": [96, 192],
            "stride": None,
            "documents": 6,
            "document_tokens": 400,
            "batch_tokens": 1000,
            "rope_interpolation": None,
            "rope_factor": None,
            "title": "test",
            "output": str(tmp_path_factory.mktemp("evaluation") / "result.json"),
        }
        return Namespace(**(defaults | changes))

    return make


@pytest.mark.usefixtures("cpu_megatron")
def test_checkpoint_of_any_layout(tmp_path, options, dataset, flags, initial):
    from support import ranks

    from megatron_cream.evaluation.run import run_perplexity

    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    save = ["--save", str(tmp_path / "out"), "--save-interval", "10"]
    start = ["--pretrained-checkpoint", initial]
    run = ranks.train(tmp_path, [*flags, *start, *save, *layout], 4)
    asked = options(checkpoint=str(tmp_path / "out"), data=dataset)
    table = run_perplexity(asked)
    with open(asked.output) as file:
        record = json.load(file)
    assert [r["length"] for r in record["results"]] == [96, 192]
    assert record["settings"]["rope_factor"] == 8.0
    assert f"{record['results'][0]['perplexity']:.3f}" in table
    # It learned: a model that guesses has 120.
    assert run.losses[10] < math.log(120)
    assert record["results"][0]["perplexity"] < 120
    # Another interpolation is another model.
    other = options(checkpoint=asked.checkpoint, data=dataset, rope_factor=1.0)
    run_perplexity(other)
    with open(other.output) as file:
        changed = json.load(file)
    assert changed["results"][0]["nll"] != record["results"][0]["nll"]


@pytest.mark.usefixtures("cpu_megatron")
def test_missing_checkpoint(options, dataset, tmp_path):
    from megatron_cream.evaluation.run import run_perplexity

    with pytest.raises(FileNotFoundError, match="--checkpoint"):
        run_perplexity(options(checkpoint=str(tmp_path), data=dataset))
