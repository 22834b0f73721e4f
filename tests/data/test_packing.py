# SPDX-License-Identifier: Apache-2.0
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.data.packed import pack


def fill(lengths, capacity):
    return np.sum(lengths) / (len(pack(lengths, capacity)) * capacity)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
def test_every_document_once_and_no_bin_too_full(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(bins.members.tolist()) == list(range(len(lengths)))
    for i in range(len(bins)):
        assert 1 <= np.take(lengths, bins[i]).sum() <= capacity


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_no_two_bins_could_be_one(lengths):
    bins = pack(lengths, 50)
    sums = sorted(np.take(lengths, bins[i]).sum() for i in range(len(bins)))
    assert len(sums) < 2 or sums[0] + sums[1] > 50


def test_two_bins_no_longer_half_empty():
    bins = pack([30, 30, 10, 20, 10, 20], 60)
    assert len(bins) == 2


def test_text_like_lengths_fill_their_bins():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20000), 16, 4096).astype(int)
    assert fill(lengths, 4096) > 0.99


def test_a_million_documents():
    lengths = np.random.default_rng(0).integers(1, 4097, size=1_000_000)
    start = time.process_time()
    assert fill(lengths, 4096) > 0.98
    assert time.process_time() - start < 20


def test_nothing_to_pack():
    assert len(pack([], 10)) == 0


@pytest.mark.parametrize("bad", [0, 11])
def test_a_length_that_cannot_fit(bad):
    with pytest.raises(ValueError, match=f"{bad}.*from 1 to 10"):
        pack([bad], 10)
