# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.positions import make_strategy

pytestmark = pytest.mark.usefixtures("cpu_megatron")


def make_sources(*args):
    from megatron_cream.data import dataset

    return dataset.make_sources(*args)


def cut(unit, lengths, train, content):
    lengths = np.array(lengths, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    sources = make_sources(unit, starts, lengths, make_strategy("pose", train, content, chunks=1))
    return sources, list(zip(sources.starts, sources.lengths, sources.ends, strict=True))


def test_documents():
    sources, rows = cut("document", [3, 10, 7], 5, 8)
    assert rows == [(3, 10, 13), (13, 7, 20)]
    assert (sources.dropped, sources.longest) == (1, 10)


def test_windows_stay_inside_documents_and_know_what_follows():
    _, rows = cut("window", [3, 21, 7], 5, 8)
    assert rows == [(3, 8, 24), (11, 8, 24), (19, 5, 24), (24, 7, 31)]


def test_packed_windows_ignore_documents():
    sources, rows = cut("packed", [3, 21, 7], 5, 8)
    assert rows == [(0, 8, 31), (8, 8, 31), (16, 8, 31), (24, 7, 31)]
    assert sources.longest == 31


def test_packed_documents_may_be_shorter_than_a_sample():
    _, rows = cut("packed-documents", [15, 16, 100, 40], 64, 80)
    assert rows == [(15, 16, 31), (31, 80, 131), (111, 20, 131), (131, 40, 171)]


def test_packed_refuses_gaps():
    with pytest.raises(ValueError, match="--sample-unit"):
        make_sources("packed", np.array([0, 10]), np.array([5, 5]), make_strategy("full", 2, 4))


@given(
    st.sampled_from(["document", "window", "packed"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(0, 40),
)
def test_sources_are_long_enough_and_apart(unit, lengths, train, more):
    content = train + more
    sources, rows = cut(unit, lengths, train, content)
    document_ends = set(np.cumsum(lengths).tolist())
    before = 0
    for start, length, end in rows:
        assert start >= before
        assert train <= length <= (max(lengths) if unit == "document" else content)
        assert start + length <= end
        assert end in (document_ends if unit != "packed" else {sum(lengths)})
        before = start + length
    if unit == "document":
        assert len(rows) == sum(length >= train for length in lengths)
        assert sources.dropped == len(lengths) - len(rows)


@pytest.mark.parametrize("unit", ["document", "window", "packed"])
def test_more_tokens_than_32_bits_count(unit):
    """Lengths come as int32, as they stand in the index; places do not fit into that."""
    lengths = np.full(3, (1 << 31) - 1, dtype=np.int32)
    starts = np.arange(3, dtype=np.int64) * int(lengths[0])
    size = 1 << 28
    sources = make_sources(unit, starts, lengths, make_strategy("pose", 16, size, chunks=1))
    total = 3 * int(lengths[0])
    expected = {
        "document": starts.tolist(),
        "window": [int(start) + size * i for start in starts for i in range(8)],
        "packed": list(range(0, total, size)),
    }[unit]
    assert sources.starts.tolist() == expected
    assert sources.ends.max() == total == (sources.starts + sources.lengths).max()
    assert sources.longest == (total if unit == "packed" else lengths[0])
