# SPDX-License-Identifier: Apache-2.0
"""What every strategy promises, over random settings."""

import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_cream.positions import STRATEGIES, make_strategy

seeds = st.integers(0, 2**64 - 1)
indices = st.integers(0, 2**40)


@st.composite
def lengths(draw):
    """(N, T): small and odd ones, factors that are not whole numbers."""
    train = draw(st.integers(3, 400))
    return train, draw(st.integers(train, 70 * train))


@st.composite
def cream_options(draw, train, target):
    options = {"gaussian": draw(st.sampled_from(["clamped", "truncated"]))}
    if draw(st.booleans()):
        options["sigma"] = draw(st.floats(0.01, 100))
    if draw(st.booleans()):
        options["sigma_relative"] = draw(st.floats(0.01, 10))
    default_fits = 4 * target // train >= 1 and 2 * (4 * target // train) < train
    if not default_fits or draw(st.booleans()):
        head = st.integers(1, (train - 1) // 2)
        options["head_lengths"] = tuple(draw(st.lists(head, min_size=1, max_size=3)))
    return options


@st.composite
def pose_options(draw, train):
    chunks = draw(st.integers(1, min(train, 9)))
    allowed = [None, "paper", "trainer"] if chunks == 2 else [None, "paper"]
    return {
        "chunks": chunks,
        "lengths": draw(st.sampled_from(allowed)),
        "content": draw(st.sampled_from(["uniform", "zero", "positions"])),
    }


@st.composite
def strategies(draw, name):
    """Arguments of make_strategy."""
    train, target = draw(lengths())
    if name == "cream":
        return train, target, draw(cream_options(train, target))
    return train, target, draw(pose_options(train)) if name == "pose" else {}


@st.composite
def document_lengths(draw, train, target):
    return draw(st.integers(train, 2 * target) | st.sampled_from([train, target, target + 1]))


def gathered(layout, document):
    return [i for offset, length in layout.spans(document) for i in range(offset, offset + length)]


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None)
@given(data=st.data(), seed=seeds, index=indices)
def test_positions_are_increasing_and_inside_the_target(name, data, seed, index):
    train, target, options = data.draw(strategies(name))
    layout = make_strategy(name, train, target, **options).layout(seed, index)
    ids = layout.position_ids
    assert ids.dtype == np.int64
    assert ids.shape == (train,)
    assert (np.diff(ids) > 0).all()
    assert ids[0] >= 0
    assert ids[-1] < target
    if name in ("cream", "pose", "full"):
        assert ids[0] == 0
    if name == "cream":
        assert ids[-1] == target - 1


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None)
@given(data=st.data(), seed=seeds, index=indices)
def test_spans_are_in_order_and_inside_the_document(name, data, seed, index):
    train, target, options = data.draw(strategies(name))
    document = data.draw(document_lengths(train, target))
    layout = make_strategy(name, train, target, **options).layout(seed, index)
    spans = layout.spans(document)
    end = 0
    for offset, length in spans:
        assert length >= 1
        assert offset >= end
        end = offset + length
    assert end <= document
    assert sum(length for _, length in spans) == train
    assert layout.spans(np.int64(document)) == spans


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None)
@given(data=st.data(), seed=seeds, index=indices)
def test_runs_joined_are_the_positions(name, data, seed, index):
    train, target, options = data.draw(strategies(name))
    layout = make_strategy(name, train, target, **options).layout(seed, index)
    runs = layout.runs()
    if runs is None:
        assert name == "randpos"
        return
    joined = np.concatenate([np.arange(start, start + length) for start, length in runs])
    np.testing.assert_array_equal(joined, layout.position_ids)
    ends = [start + length for start, length in runs]
    assert all(end < start for end, (start, _) in zip(ends, runs[1:], strict=False))


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=seeds, index=indices)
def test_a_layout_depends_on_seed_and_index_alone(name, data, seed, index):
    train, target, options = data.draw(strategies(name))
    document = data.draw(document_lengths(train, target))
    order = [index, index + 1, index + 17]

    def content(strategy, i):
        layout = strategy.layout(seed, i)
        return layout.position_ids.tolist(), gathered(layout, document)

    strategy = make_strategy(name, train, target, **options)
    first = {i: content(strategy, i) for i in order}
    fresh = make_strategy(name, train, target, **options)
    assert {i: content(fresh, i) for i in reversed(order)} == first
    elsewhere = {}
    thread = threading.Thread(
        target=lambda: elsewhere.update((i, content(strategy, i)) for i in order)
    )
    thread.start()
    thread.join()
    assert elsewhere == first


@pytest.mark.parametrize("name", ["cream", "pose", "randpos"])
def test_seeds_and_indices_draw_anew(name):
    strategy = make_strategy(name, 4096, 32768)
    drawn = {
        strategy.layout(seed, index).position_ids.tobytes()
        for seed in range(10)
        for index in range(10)
    }
    assert len(drawn) > 95


@pytest.mark.parametrize("name", STRATEGIES)
def test_numpy_integers_are_as_good_as_plain_ones(name):
    plain = make_strategy(name, 4096, 32768)
    numpy = make_strategy(name, np.int32(4096), np.int32(32768))
    for index in range(20):
        ids = numpy.layout(np.int64(3), np.int64(index)).position_ids
        np.testing.assert_array_equal(ids, plain.layout(3, index).position_ids)
        assert numpy.layout(3, index).spans(9000) == plain.layout(3, index).spans(9000)


@given(lengths=lengths())
def test_full_is_plain_text_at_plain_positions(lengths):
    train, target = lengths
    layout = make_strategy("full", train, target).layout(1, 2)
    assert layout.position_ids.tolist() == list(range(train))
    assert layout.spans(target) == [(0, train)]


@pytest.mark.parametrize("name", STRATEGIES)
@given(lengths=lengths(), missing=st.integers(1, 400))
def test_short_documents_are_refused(name, lengths, missing):
    train, target = lengths
    assume(name != "cream" or 2 * (4 * target // train) < train)
    layout = make_strategy(name, train, target).layout(1, 2)
    with pytest.raises(ValueError, match="--seq-length"):
        layout.spans(max(0, train - missing))


@pytest.mark.parametrize("name", STRATEGIES)
def test_target_below_train_is_refused(name):
    with pytest.raises(ValueError, match="--target-length.*--seq-length"):
        make_strategy(name, 4096, 4095)
    with pytest.raises(ValueError, match="--seq-length"):
        make_strategy(name, 0, 4096)


@pytest.mark.parametrize("value", [4096.0, "4096", True, None])
def test_lengths_must_be_whole_numbers(value):
    with pytest.raises(TypeError, match="target_length"):
        make_strategy("full", 1, value)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="--position-strategy.*'creme'.*cream"):
        make_strategy("creme", 4096, 32768)


@pytest.mark.parametrize(
    ("name", "option"), [("full", "sigma"), ("pose", "sigma"), ("cream", "chunks")]
)
def test_unknown_option_is_refused(name, option):
    with pytest.raises(ValueError, match=f"'{name}' has no option '{option}'"):
        make_strategy(name, 4096, 32768, **{option: 2})


@pytest.mark.parametrize(
    ("name", "length"), [("full", 8), ("randpos", 8), ("cream", 64), ("pose", 64)]
)
def test_content_length_is_what_a_sample_chooses_from(name, length):
    assert (
        make_strategy(
            name, 8, 64, **({"head_lengths": (2,)} if name == "cream" else {})
        ).content_length
        == length
    )
