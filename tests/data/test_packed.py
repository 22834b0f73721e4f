# SPDX-License-Identifier: Apache-2.0
"""Packed samples against the documents they come from. Token k of document d is 1000 * d + k."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.packed import PackedSpanDataset, pack

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 256, 512
LENGTHS = [100, 130, 84, 96, 63, 700, 80, 1200, 90, 110]
STEP = 10_000


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    found = []
    for name, first in (("a", 0), ("b", 1_000_000)):
        prefix = str(tmp_path_factory.mktemp("packed") / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
        for d, length in enumerate(LENGTHS):
            builder.add_document(first + STEP * d + np.arange(length), [length])
        builder.finalize(prefix + ".idx")
        found.append(prefix)
    return found


def build(prefixes, split="100,0,0", weights=None, **changes):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_cream.data.dataset import SpanDatasetConfig

    extension = ExtensionConfig(
        train_length=N,
        target_length=T,
        original_length=N,
        position_strategy="cream",
        sample_unit="packed-documents",
        **changes,
    )
    config = SpanDatasetConfig(
        random_seed=7,
        sequence_length=N,
        blend=(prefixes, weights),
        split=split,
        extension=extension,
    )
    sizes = [40, 10, 0]
    return BlendedMegatronDatasetBuilder(PackedSpanDataset, sizes, lambda: True, config).build()


def documents(sample):
    """Cut a sample at its boundaries; the padding is left out."""
    ends = sample["cu_seqlens"].tolist()
    parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [part for part in parts if sample["loss_mask"][part].any()]


def test_a_sample_is_whole_documents_side_by_side(prefixes):
    train = build(prefixes[:1])[0]
    several = 0
    for index in range(len(train)):
        sample = train[index]
        ends = sample["cu_seqlens"]
        assert ends.dtype == torch.int32
        assert ends[0] == 0 and ends[-1] == N and (ends.diff() > 0).all()
        assert not (ends % 16).any()
        parts = documents(sample)
        several += len(parts) > 1
        for part in parts:
            d = int(sample["tokens"][part][0]) // STEP
            count = part.stop - part.start
            assert (sample["tokens"][part] // STEP == d).all()
            assert count == N or count == LENGTHS[d] // 16 * 16 or LENGTHS[d] > T
    assert several > 10


def test_each_document_has_a_layout_of_its_own_that_reaches_the_target(prefixes):
    train = build(prefixes[:1])[0]
    seen = {}
    for index in range(len(train)):
        sample = train[index]
        for part in documents(sample):
            ids = sample["position_ids"][part]
            assert (ids.diff() > 0).all()
            assert ids[0] == 0 and ids[-1] == T - 1
            seen.setdefault(len(ids), set()).add(tuple(ids.tolist()))
    assert all(len(layouts) > 3 for layouts in seen.values()), "drawn anew each time"


def test_no_two_documents_share_a_layout(prefixes):
    """Not those side by side, not those of the next sample, in a blend as alone."""
    from megatron_cream.training.datasets import BlendedSpans

    alone = build(prefixes[:1])[0]
    for train in (alone, BlendedSpans(build(prefixes, weights=[0.4, 0.6])[0])):
        seen = []
        for index in range(len(train)):
            sample = train[index]
            for i, part in enumerate(documents(sample)):
                ids = sample["position_ids"][part]
                strategy = alone.strategy.for_length(len(ids))
                expected = strategy.layout(1234, (index << 20) + i).position_ids
                assert ids.tolist() == expected.tolist()
                seen.append(tuple(ids.tolist()))
        assert len(set(seen)) > 0.8 * len(seen)


def test_labels_do_not_cross_documents(prefixes):
    train = build(prefixes[:1])[0]
    for index in range(len(train)):
        sample = train[index]
        trained = sample["loss_mask"].bool()
        assert torch.equal(sample["labels"][trained], sample["tokens"][trained] + 1)


def test_every_text_once_an_epoch(prefixes):
    train = build(prefixes[:1])[0]
    epoch = train.epoch_size
    for first in (0, epoch):
        found = []
        for index in range(first, first + epoch):
            sample = train[index]
            found += [int(sample["tokens"][part][0]) for part in documents(sample)]
        assert len(set(found)) == len(found)
        # 63 tokens are too few for heads that reach T; 700 and 1200 tokens are cut every T.
        assert {token // STEP for token in found} == {0, 1, 2, 3, 5, 6, 7, 8, 9}
        assert sum(token // STEP == 7 for token in found) == 3


def test_validation_has_plain_positions_in_every_document(prefixes):
    valid = build(prefixes[:1], split="50,50,0")[1]
    for index in range(10):
        sample = valid[index]
        for part in documents(sample):
            count = part.stop - part.start
            assert torch.equal(sample["position_ids"][part], torch.arange(count))


@pytest.mark.parametrize("count", [1, 2])
def test_middle_stages_draw_the_same_positions_without_a_token(prefixes, count, monkeypatch):
    from megatron_cream.data.dataset import SpanReader
    from megatron_cream.training.datasets import BlendedSpans, PackedPositions

    def build_one():
        train = build(prefixes[:count], weights=[0.5] * count if count > 1 else None)[0]
        return BlendedSpans(train) if count > 1 else train

    whole, middle = build_one(), PackedPositions(build_one())
    assert len(whole) == len(middle) and whole[0] is not None
    expected = [whole[i] for i in range(len(whole))]
    monkeypatch.setattr(SpanReader, "read", lambda *a: pytest.fail("read a token"))
    for i in range(len(middle)):
        found = middle[i]
        assert set(found) == {"position_ids", "cu_seqlens"}
        for name in found:
            assert torch.equal(found[name], expected[i][name])


def test_nothing_long_enough(prefixes):
    with pytest.raises(ValueError, match=r"128 tokens of one \(what the strategy .* has 100"):
        build(prefixes[:1], split="10,90,0", position_options={"head_lengths": (60,)})


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
