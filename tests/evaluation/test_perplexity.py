# SPDX-License-Identifier: Apache-2.0
"""Every target once, at every length; and a checkpoint scores what the trainer computed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import arguments
from support.evaluation import run

from megatron_cream.evaluation.forward import PassScores
from megatron_cream.evaluation.perplexity import (
    buckets,
    perplexity_results,
    score_document,
    windows,
)
from megatron_cream.evaluation.result_files import read_result


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


@given(st.integers(2, 40), st.integers(0, 20))
def test_without_a_stride_it_is_the_first_tokens_in_one_window(length, more):
    """As both papers' first table has it: L tokens go in, L - 1 of them are targets."""
    document = np.arange(length + more)
    found = score_document(Copycat(length - 1), document, length, None)
    assert sum(found.targets) == length - 1
    assert sum(found.nll) == sum(range(1, length))


class Copycat:
    """Log-probability of a target: minus its token id."""

    def __init__(self, length):
        self.length = length

    def run(self, passes):
        for one in passes:
            assert one.tokens.shape[1] == self.length
            assert torch.equal(one.positions()[0], torch.arange(self.length))
            inside = one.rows[:-1] + 1
            assert torch.equal(one.tokens[:, inside], one.targets[:, :-1])
            yield PassScores(-one.targets.double(), one.targets)


@pytest.mark.parametrize("length", [4, 16, 49])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_sum_over_targets_by_position(length, stride):
    seen = []
    found = score_document(Copycat(length), np.arange(50), length, stride, 7, 32, seen.append)
    assert found.document == 7
    assert sum(found.nll) == pytest.approx(sum(range(1, 50)))
    assert sum(found.targets) == 49
    assert sum(seen) == length * len(windows(50, length, stride))


@given(st.integers(1, 5000))
def test_buckets_cover_a_window_once(length):
    edges = buckets(length)
    assert edges[0] == 0 and edges[-1] == length
    assert edges == sorted(set(edges))


def test_positions_are_those_in_the_window():
    document = np.arange(1000)
    found = score_document(Copycat(600), document, 600, 200)
    # The first window scores places 0 .. 599; the next 400 .. 599; the last one 401 .. 599.
    assert found.targets == [256, 256 + 112 + 111, 3 * 88]
    assert found.nll[0] == sum(range(1, 257))


def test_interval_is_over_documents():
    records = [
        {"length": 8, "document": i, "nll": [nll], "targets": [10]}
        for i, nll in enumerate((20.0, 30.0, 40.0))
    ]
    (row,) = perplexity_results(records)["lengths"]
    assert row["perplexity"] == pytest.approx(math.exp(3))
    half = 4.303 * 1.0 / math.sqrt(3)
    assert row["low"] == pytest.approx(math.exp(3 - half))
    assert row["high"] == pytest.approx(math.exp(3 + half))


def test_truncated_windows_need_documents_of_the_longest_length_only(small_hf):
    asked = {"hf": small_hf, "data": "text", "lengths": [96, 200], "truncate": True}
    arguments(**asked, document_tokens=200).validate()
    assert arguments(**asked).tokens_per_document == 200
    with pytest.raises(ValueError, match="--document-tokens is 199: it must be at least .* 200"):
        arguments(**asked, document_tokens=199).validate()
    with pytest.raises(ValueError, match="--stride is 8 with --truncate: it must be left out"):
        arguments(**asked, stride=8).validate()


@pytest.mark.usefixtures("cpu_megatron")
def test_checkpoint_of_any_layout(tmp_path, dataset, flags, initial):
    from support import ranks

    from megatron_cream.evaluation.perplexity import open_documents, score_perplexity

    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    save = ["--save", str(tmp_path / "out"), "--save-interval", "10", "--train-iters", "10"]
    start = ["--pretrained-checkpoint", initial]
    trained = ranks.train(tmp_path, [*flags, *start, *save, *layout], 4)
    asked = {"checkpoint": str(tmp_path / "out"), "data": dataset, "lengths": [96, 192]}
    output = str(tmp_path / "result")
    table = run(arguments(**asked, document_tokens=400, output=output))
    record = read_result(output)
    assert [row["length"] for row in record["lengths"]] == [96, 192]
    assert record["extension"]["rope_factor"] == 8.0
    assert f"{record['lengths'][0]['perplexity']:.3f}" in table
    # It learned: a model that guesses has 120.
    assert trained.losses[10] < math.log(120)
    assert record["lengths"][0]["perplexity"] < 120
    # Another interpolation is another model.
    other = arguments(**asked, document_tokens=400, rope_factor=1.0)
    from megatron_cream.evaluation.evaluate import open_model

    model = open_model(other)
    changed = score_perplexity(other, model, open_documents(other, model))
    assert changed["lengths"][0]["nll"] != record["lengths"][0]["nll"]


@pytest.mark.usefixtures("cpu_megatron")
def test_missing_checkpoint(dataset, tmp_path):

    with pytest.raises(FileNotFoundError, match="--checkpoint"):
        run(arguments(checkpoint=str(tmp_path), data=dataset))
