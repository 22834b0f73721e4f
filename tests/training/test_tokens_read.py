# SPDX-License-Identifier: Apache-2.0
"""The start block's lines about how much text a run reads."""

from argparse import Namespace

import pytest
from support.runs import write_dataset

from megatron_cream.config import ExtensionConfig

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 96, 768


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    return write_dataset(folder / "a", [8 * N] * 50), write_dataset(folder / "b", [N] * 100)


@pytest.fixture
def lines():
    from megatron_cream.training.start_block import tokens_read

    def call(data, samples, unit="window", strategy="full", split="100,0,0"):
        args = Namespace(
            data_path=data,
            data_args_path=None,
            data_cache_path=None,
            per_split_data_args_path=None,
            train_data_path=None,
            valid_data_path=None,
            test_data_path=None,
            split=split,
            train_samples=samples,
        )
        extension = ExtensionConfig(N, T, N, strategy, sample_unit=unit)
        return tokens_read(args, extension)

    return call


def test_every_dataset_of_a_blend_has_its_share(lines, datasets):
    a, b = datasets
    first, second = lines(["0.8", a, "0.2", b], samples=250)
    # 200 of the 400 windows of N tokens that a has, 50 of the 100 documents of b.
    assert first == f"19200 of 38400 tokens, the most repeated once: {a}"
    assert second == f"4800 of 9600 tokens, the most repeated once: {b}"


def test_more_than_a_few_times_is_a_warning(lines, datasets):
    a, _ = datasets
    (document,) = lines([a], samples=300, unit="document")
    assert document.startswith("4800 of 38400 tokens, the most repeated 6 times (WARNING: ")
    (window,) = lines([a], samples=300)
    assert "WARNING" not in window


def test_the_training_split_alone_is_counted(lines, datasets):
    a, _ = datasets
    (line,) = lines([a], samples=200, split="50,50,0")
    assert line.startswith("19200 of 19200 tokens")


def test_packed_documents_are_counted_by_their_samples(lines, datasets):
    _, b = datasets
    (line,) = lines([b], samples=50, unit="packed-documents")
    assert line.startswith("4800 of 9600 tokens, the most repeated once")


def test_a_dataset_that_is_named_twice_has_both_weights(lines, datasets):
    a, b = datasets
    assert lines(["0.5", a, "0.2", b, "0.3", a], samples=250) == lines(
        ["0.8", a, "0.2", b], samples=250
    )
