# SPDX-License-Identifier: Apache-2.0
"""Samples against the documents they come from. Token k of document d is 100 * d + k."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig
from megatron_cream.data.indexed import DatasetIndex
from megatron_cream.data.text_sources import make_sources
from megatron_cream.positions import make_strategy

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 12, 60
LENGTHS = [11, 12, 40, 60, 95, 30]
STEP = 100


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    found = []
    for name, first in (("a", 0), ("b", 1000)):
        prefix = str(tmp_path_factory.mktemp("spans") / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
        for d, length in enumerate(LENGTHS):
            builder.add_document(first + STEP * d + np.arange(length), [length])
        builder.finalize(prefix + ".idx")
        found.append(prefix)
    return found


def extension(**changes):
    options = {
        "train_length": N,
        "target_length": T,
        "original_length": N,
        "position_strategy": "cream",
        "cream_head_lengths": (3, 4),
    }
    return ExtensionConfig.from_dict(options | changes)


def build(
    prefixes,
    samples=50,
    weights=None,
    split="100,0,0",
    eod=None,
    random_seed=7,
    mapped=True,
    **changes,
):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    config = SpanDatasetConfig(
        random_seed=random_seed,
        mmap_bin_files=mapped,
        sequence_length=N,
        blend=(prefixes, weights),
        split=split,
        extension=extension(**changes),
        eod_id=eod,
        eod_mask_loss=eod is not None,
    )
    sizes = [samples, 10, 0]
    return BlendedMegatronDatasetBuilder(SpanDataset, sizes, lambda: True, config).build()


def document_of(tokens):
    return int(tokens[0]) // STEP


@pytest.mark.parametrize("strategy", ["cream", "pose", "randpos", "full"])
def test_a_sample_is_its_layout_read_from_one_document(prefixes, strategy):
    train = build(prefixes[:1], position_strategy=strategy)[0]
    assert len(train) == 50
    for index in range(50):
        sample = train[index]
        layout = train.strategy.layout(1234, index)
        tokens = sample["tokens"].numpy()
        length = LENGTHS[document_of(tokens)]
        content = np.concatenate([np.arange(o, o + n) for o, n in layout.spans(length)])
        np.testing.assert_array_equal(tokens % STEP, content)
        np.testing.assert_array_equal(sample["position_ids"], layout.position_ids)
        assert {name: value.dtype for name, value in sample.items()} == {
            "tokens": torch.int64,
            "labels": torch.int64,
            "position_ids": torch.int64,
            "loss_mask": torch.float32,
        }


def test_content_stands_at_its_own_position_in_a_document_of_the_target_length(prefixes):
    train = build(prefixes[:1])[0]
    for index in range(50):
        sample = train[index]
        if document_of(sample["tokens"]) == LENGTHS.index(T):
            assert torch.equal(sample["tokens"] % STEP, sample["position_ids"])


def test_true_next_labels(prefixes):
    train = build(prefixes[:1])[0]
    for index in range(50):
        sample = train[index]
        last = LENGTHS[document_of(sample["tokens"])] - 1
        has_next = (sample["tokens"] % STEP) < last
        assert torch.equal(sample["loss_mask"], has_next.float())
        assert torch.equal(sample["labels"][has_next], sample["tokens"][has_next] + 1)


def test_masked_labels_differ_at_chunk_borders_only(prefixes):
    free, masked = build(prefixes[:1])[0], build(prefixes[:1], label_rule="masked")[0]
    borders = 0
    for index in range(50):
        a, b = free[index], masked[index]
        jump = torch.diff(a["tokens"]) != 1
        expected = a["loss_mask"].clone()
        expected[:-1][jump] = 0.0
        assert torch.equal(b["loss_mask"], expected)
        assert torch.equal(a["labels"], b["labels"])
        borders += int(jump.sum())
    assert borders > 50


def test_reference_labels_are_the_next_token_of_the_sample(prefixes):
    train = build(prefixes[:1], label_rule="reference")[0]
    for index in range(20):
        sample = train[index]
        assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
        assert sample["loss_mask"].tolist() == [1.0] * (N - 1) + [0.0]


def test_no_loss_after_an_end_of_document(prefixes):
    train = build(prefixes[:1], sample_unit="packed", eod=4 * STEP)[0]
    masked = [train[i]["loss_mask"][train[i]["tokens"] == 4 * STEP] for i in range(50)]
    assert torch.cat(masked).numel() > 0
    assert not torch.cat(masked).any()


def test_every_long_enough_document_once_an_epoch_and_new_positions_in_the_next(prefixes):
    train = build(prefixes[:1])[0]
    epoch = len(train.sources)
    assert epoch == 5  # 11 tokens are too few
    for first in (0, epoch):
        seen = sorted(document_of(train[i]["tokens"]) for i in range(first, first + epoch))
        assert seen == [1, 2, 3, 4, 5]
    of_document = {}
    for i in range(2 * epoch):
        sample = train[i]
        of_document.setdefault(document_of(sample["tokens"]), []).append(sample["position_ids"])
    assert any(not torch.equal(a, b) for a, b in of_document.values())


def test_draws_the_order_of_an_epoch_once(prefixes, monkeypatch):
    """Also in a blend of many datasets, which take turns."""
    from megatron_cream.positions import philox

    members = [build(prefixes[:1])[0] for _ in range(12)]
    drawn = []
    own = philox.generator
    monkeypatch.setattr(philox, "generator", lambda *args: drawn.append(args) or own(*args))
    for index in range(2 * len(members[0].sources)):
        for member in members:
            member[index]
    assert len(drawn) == 2 * len(members)


def test_draws_the_orders_of_a_few_epochs_once_in_any_order(prefixes, monkeypatch):
    from megatron_cream.data import dataset
    from megatron_cream.positions import philox

    train = build(prefixes[:1])[0]
    size = len(train.sources)
    drawn = []
    own = philox.generator
    monkeypatch.setattr(philox, "generator", lambda *args: drawn.append(args) or own(*args))
    shuffled = np.random.default_rng(3).permutation(6 * size).tolist()
    expected = [train.chosen(i) for i in shuffled]
    assert len(drawn) == 6
    monkeypatch.setattr(dataset, "_KEPT_ORDERS", 2 * size)
    small = build(prefixes[:1])[0]
    assert [small.chosen(i) for i in shuffled] == expected
    assert len(small._orders) <= 2 < 6 < len(drawn) - 6


@pytest.mark.parametrize("seed", [7, 8])
def test_order_of_an_epoch_is_drawn_from_seed_and_epoch(prefixes, seed):
    """The stream that docs/positions.md names, asked of numpy itself."""
    train = build(prefixes[:1], random_seed=seed, position_seed=99)[0]
    size = train.epoch_size
    orders = []
    for epoch in range(4):
        key = np.array([seed, epoch], dtype=np.uint64)
        stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, 1], dtype=np.uint64))
        expected = np.random.Generator(stream).permutation(size).tolist()
        orders.append([train.chosen(epoch * size + i) for i in range(size)])
        assert orders[-1] == expected
    assert len({tuple(order) for order in orders}) > 2


def test_a_drawn_scale_is_that_of_the_layout(prefixes):
    """Positions of scale t end at t * N0, in a blend too, whose datasets count for themselves."""
    from megatron_cream.training.datasets import BlendedSpans, PositionsOnly

    clex = {"rope_interpolation": "clex", "rope_factor": T / N, "position_seed": 5}
    alone = build(prefixes[:1], **clex)[0]
    blend = BlendedSpans(build(prefixes, weights=[0.3, 0.7], **clex)[0])
    middle = PositionsOnly(extension(**clex), 50)
    for dataset in (alone, blend, middle):
        scales = set()
        for index in range(50):
            sample = dataset[index]
            scale = sample["scale"].item()
            scales.add(scale)
            assert sample["position_ids"].max() == alone.strategy.reach(scale) - 1
            assert scale == alone.strategy.scale(5, index)
        assert len(scales) > 2


@pytest.mark.parametrize("mapped", [True, False])
def test_tokens_far_behind_two_to_the_32(tmp_path, mapped):
    """A file of 8 GiB with a hole; each document is where the index says."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_cream.corpus.inspection import document_text
    from megatron_cream.corpus.storage import write_index

    lengths = np.array([(1 << 31) - 1, (1 << 31) - 1, 70, T])
    starts = np.cumsum(lengths) - lengths
    prefix = str(tmp_path / "far")
    write_index(prefix + ".idx", np.dtype(np.uint16), [(lengths, np.ones(4, np.int64))], 4, 4)
    with open(prefix + ".bin", "wb") as file:
        for d, start in enumerate(starts.tolist()):
            file.seek(2 * start)
            file.write((STEP * d + np.arange(70)[: lengths[d]]).astype(np.uint16).tobytes())
        file.truncate(2 * int(lengths.sum()))
    whole = IndexedDataset(prefix)  # which its arrays must not outlive
    assert whole[3].tolist() == list(range(3 * STEP, 3 * STEP + T))
    train = build([prefix], mapped=mapped, position_strategy="pose")[0]
    seen = set()
    for index in range(12):
        tokens, d = train[index]["tokens"].numpy(), train.chosen(index)
        spans = train.strategy.layout(1234, index).spans(int(lengths[d]))
        places = [k for offset, n in spans for k in range(offset, offset + n)]
        expected = [STEP * d + k if k < min(70, lengths[d]) else 0 for k in places]
        np.testing.assert_array_equal(tokens, expected)
        seen.add(d)
    assert seen == {0, 1, 2, 3}
    assert document_text(prefix, 2, "ByteLevelTokenizer", None, 3) == bytes([200, 201, 202]).decode(
        errors="replace"
    )


def test_same_sample_from_any_worker(prefixes):
    train = build(prefixes[:1])[0]
    loader = torch.utils.data.DataLoader(train, batch_size=5, num_workers=2)
    for batch, first in zip(loader, range(0, 50, 5), strict=True):
        for name in ("tokens", "labels", "position_ids", "loss_mask"):
            expected = torch.stack([train[first + i][name] for i in range(5)])
            assert torch.equal(batch[name], expected)


def test_validation_has_plain_positions(prefixes):
    valid = build(prefixes[:1], split="50,50,0")[1]
    for index in range(10):
        assert torch.equal(valid[index]["position_ids"], torch.arange(N))


def test_blend_draws_layouts_by_its_own_index(prefixes):
    from megatron_cream.training.datasets import BlendedSpans, PositionsOnly

    blend = BlendedSpans(build(prefixes, weights=[0.5, 0.5])[0])
    middle_stage = PositionsOnly(extension(), 50)
    layouts, sides = [], set()
    for index in range(50):
        sample = blend[index]
        positions = middle_stage[index]["position_ids"]
        assert torch.equal(sample["position_ids"], positions)
        layouts.append(tuple(positions.tolist()))
        sides.add(int(sample["tokens"][0]) >= 1000)
    assert sides == {False, True}
    assert len(set(layouts)) > 25  # what each dataset drawing by its own index would give


def test_nothing_long_enough(prefixes):
    with pytest.raises(ValueError, match="longest of its 6 has 95"):
        build(prefixes[:1], train_length=96, target_length=200, cream_head_lengths=(9,))


def test_middle_stages_open_no_file(monkeypatch):
    from megatron_cream.training.datasets import PositionsOnly

    def refuse(*args, **kwargs):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(np, "memmap", refuse)
    only = PositionsOnly(extension(), 3)
    found = [only[i]["position_ids"] for i in range(len(only))]
    monkeypatch.undo()
    expected = [extension().strategy().layout(1234, i).position_ids for i in range(3)]
    np.testing.assert_array_equal(torch.stack(found), expected)


def test_plain_samples_are_plain_on_every_stage_and_read_consecutive_tokens(prefixes):
    from megatron_cream.training.datasets import PositionsOnly

    share = {"plain_share": 0.4, "sample_unit": "window"}
    train = build(prefixes[:1], samples=200, **share)[0]
    middle_stage = PositionsOnly(extension(**share), 200)
    plain = 0
    for index in range(200):
        sample = train[index]
        assert (sample["position_ids"] == middle_stage[index]["position_ids"]).all()
        if (sample["position_ids"] == torch.arange(N)).all():
            plain += 1
            assert (sample["tokens"].diff() == 1).all()
            assert (sample["labels"] == sample["tokens"] + 1)[:-1].all()
    assert abs(plain / 200 - 0.4) < 0.12


def sources_of(unit, lengths, strategy):
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    index = DatasetIndex("none", np.dtype(np.uint8), np.asarray(lengths), starts, starts)
    return make_sources(unit, index, range(len(lengths)), strategy)


def cut(unit, lengths, train, content):
    lengths = np.array(lengths, dtype=np.int32)
    sources = sources_of(unit, lengths, make_strategy("pose", train, content, chunks=1))
    rows = list(zip(sources.starts, sources.lengths, sources.ends, strict=True))
    assert [sources.stretch(i) for i in range(len(sources))] == rows
    return sources, rows


def test_documents():
    sources, rows = cut("document", [3, 10, 7], 5, 8)
    assert rows == [(3, 10, 13), (13, 7, 20)]
    assert sources.rows.dtype.names == ("start", "length")


def test_windows_stay_inside_documents_and_know_what_follows():
    _, rows = cut("window", [3, 21, 7], 5, 8)
    assert rows == [(3, 8, 12), (11, 8, 20), (19, 5, 24), (24, 7, 31)]


def test_packed_windows_ignore_documents():
    _, rows = cut("packed", [3, 21, 7], 5, 8)
    assert rows == [(0, 8, 9), (8, 8, 17), (16, 8, 25), (24, 7, 31)]


def test_packed_documents_may_be_shorter_than_a_sample():
    _, rows = cut("packed-documents", [15, 16, 100, 40], 64, 80)
    assert rows == [(15, 16, 31), (31, 80, 112), (111, 20, 131), (131, 40, 171)]


@given(
    st.sampled_from(["document", "window", "packed"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(0, 40),
)
def test_sources_are_long_enough_and_apart(unit, lengths, train, more):
    content = train + more
    _, rows = cut(unit, lengths, train, content)
    document_ends = set(np.cumsum(lengths).tolist()) if unit != "packed" else {sum(lengths)}
    before = 0
    for start, length, end in rows:
        assert start >= before
        assert train <= length <= (max(lengths) if unit == "document" else content)
        assert end == start + length + (start + length not in document_ends)
        before = start + length
    if unit == "document":
        assert len(rows) == sum(length >= train for length in lengths)


def pieces_one_by_one(unit, lengths, train, content):
    """The same list, a piece at a time."""
    if unit == "packed":
        lengths = [sum(lengths)]
    found, start = [], 0
    for length in lengths:
        size = length if unit == "document" else content
        for at in range(0, length, size):
            count = min(size, length - at)
            if count >= train:
                found.append((start + at, count, start + at + count + (at + count < length)))
        start += length
    return found


@given(
    st.sampled_from(["document", "window", "packed"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(1, 9),
)
def test_sources_do_not_depend_on_the_blocks_they_are_made_in(unit, lengths, block):
    from unittest import mock

    from megatron_cream.data import text_sources

    with mock.patch.object(text_sources, "_BLOCK", block):
        assert cut(unit, lengths, 5, 8)[1] == pieces_one_by_one(unit, lengths, 5, 8)


@pytest.mark.parametrize("unit", ["document", "window", "packed"])
def test_more_tokens_than_32_bits_count(unit):
    """Lengths come as int32, as they stand in the index; places do not fit into that."""
    lengths = np.full(3, (1 << 31) - 1, dtype=np.int32)
    starts = np.arange(3, dtype=np.int64) * int(lengths[0])
    size = 1 << 28
    sources = sources_of(unit, lengths, make_strategy("pose", 16, size, chunks=1))
    total = 3 * int(lengths[0])
    expected = {
        "document": starts.tolist(),
        "window": [int(start) + size * i for start in starts for i in range(8)],
        "packed": list(range(0, total, size)),
    }[unit]
    assert sources.starts.tolist() == expected
    assert sources.ends.max() == total == (sources.starts + sources.lengths).max()


def test_shards_without_weights_are_one_epoch_of_all_of_them(prefixes):
    from megatron_cream.training.datasets import BlendedSpans

    sizes = [len(build([prefix])[0].sources) for prefix in prefixes]
    for wanted in (4, sum(sizes), 50):
        train = BlendedSpans(build(prefixes, samples=wanted)[0])
        assert len(train) == min(wanted, sum(sizes))
        first = [int(train[i]["tokens"][0]) // STEP for i in range(len(train))]
        assert len(set(first)) == len(train)  # every document once
