# SPDX-License-Identifier: Apache-2.0
"""Samples against a token by token construction, from mapped and from read files."""

import pickle

import numpy as np
import pytest
import torch

from megatron_cream.config import ExtensionConfig

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 48, 200
LENGTHS = [47, 48, 49, 200, 30, 530, 96]
EOD = 5


@pytest.fixture(scope="module", params=[np.uint16, np.int32])
def prefix(request, tmp_path_factory):
    """A dataset of documents that end with EOD."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    path = str(tmp_path_factory.mktemp("reader") / "a")
    builder = IndexedDatasetBuilder(path + ".bin", dtype=request.param)
    rng = np.random.default_rng(1)
    for length in LENGTHS:
        document = rng.integers(EOD + 1, 60000, size=length)
        document[-1] = EOD
        builder.add_document(document, [length])
    builder.finalize(path + ".idx")
    return path


def build(prefix, mapped=True, eod=None, **changes):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig

    options = {"position_strategy": "cream", "sample_unit": "window"} | changes
    config = SpanDatasetConfig(
        random_seed=7,
        sequence_length=N,
        blend=([prefix], None),
        split="100,0,0",
        mmap_bin_files=mapped,
        extension=ExtensionConfig(train_length=N, target_length=T, original_length=N, **options),
        eod_id=eod,
        eod_mask_loss=eod is not None,
    )
    return BlendedMegatronDatasetBuilder(SpanDataset, [30, 0, 0], lambda: True, config).build()[0]


def token_by_token(train, index, label_rule, eod):
    """Return the sample as the docs describe it, from the whole file in a list."""
    dtype = train.dataset.index.dtype
    file = np.fromfile(train.dataset_path + ".bin", dtype=dtype).tolist()
    source = train.chosen(index)
    start, end = int(train.sources.starts[source]), int(train.sources.ends[source])
    layout = train.strategy.layout(train.config.extension.position_seed, index)
    spans = layout.spans(int(train.sources.lengths[source]))
    places = [start + o + k for o, n in spans for k in range(n)]
    tokens = [file[place] for place in places]
    labels = [file[place + 1] if place + 1 < end else 0 for place in places]
    mask = [float(place + 1 < end) for place in places]
    if label_rule == "reference":
        labels, mask = [*tokens[1:], 0], [1.0] * (N - 1) + [0.0]
    if label_rule == "masked":
        jumps = [b != a + 1 for a, b in zip(places, places[1:], strict=False)]
        mask = [0.0 if jump else m for m, jump in zip(mask, [*jumps, False], strict=True)]
    mask = [0.0 if token == eod else m for token, m in zip(tokens, mask, strict=True)]
    ids = [start + k for start, n in (layout.runs() or []) for k in range(n)]
    return tokens, labels, mask, ids or layout.position_ids.tolist()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("label_rule", ["true-next", "masked", "reference"])
@pytest.mark.parametrize("unit", ["document", "window", "packed"])
@pytest.mark.parametrize("strategy", ["cream", "pose", "randpos", "full"])
def test_a_sample_is_what_its_tokens_say_one_by_one(prefix, mapped, label_rule, unit, strategy):
    eod = EOD if unit == "packed" else None
    train = build(
        prefix, mapped, eod, position_strategy=strategy, label_rule=label_rule, sample_unit=unit
    )
    for index in range(30):
        sample = train[index]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        found = tuple(sample[name].tolist() for name in names)
        assert found == token_by_token(train, index, label_rule, eod)
        assert [sample[name].dtype for name in names] == [
            torch.int64,
            torch.int64,
            torch.float32,
            torch.int64,
        ]


def test_a_sample_may_be_written_to(prefix):
    train = build(prefix)
    before = [{k: v.clone() for k, v in train[i].items()} for i in range(10)]
    for i in range(10):
        for value in train[i].values():
            value.fill_(-1)
    for i in range(10):
        assert all(torch.equal(value, before[i][name]) for name, value in train[i].items())


def test_arrays_of_a_sample_are_apart(prefix):
    sample = build(prefix)[0]
    sample["tokens"].fill_(-1)
    assert (sample["labels"] >= 0).all()
    for value in sample.values():  # or a saved tensor would carry its neighbours
        assert value.untyped_storage().nbytes() == value.nbytes


class Recorder:
    def __init__(self, tokens, spans):
        self.tokens, self.spans = tokens, spans

    def __getitem__(self, span):
        self.spans.append(span.stop - span.start)
        return self.tokens[span]


def test_touches_no_more_than_it_trains_on(prefix, monkeypatch):
    train, spans = build(prefix), []
    monkeypatch.setattr(train.reader, "tokens", Recorder(train.reader.tokens, spans))
    for index in range(10):
        spans.clear()
        train[index]
        assert N <= sum(spans) <= N + len(spans)
        assert len(spans) == 3


@pytest.mark.parametrize(("mapped", "calls"), [(True, 0), (False, 3)])
def test_calls_megatrons_reader_once_a_span_or_never(prefix, mapped, calls, monkeypatch):
    train, counts = build(prefix, mapped), []
    reader = train.dataset.bin_reader
    own = reader.read
    monkeypatch.setattr(reader, "read", lambda dtype, n, at: counts.append(n) or own(dtype, n, at))
    train[3]
    assert len(counts) == calls


def test_a_mapped_file_is_not_copied(prefix):
    train = build(prefix)
    assert not train.reader.tokens.flags.owndata
    assert not train.reader.tokens.flags.writeable
    opened = build(prefix, mapped=False)
    assert not isinstance(opened.reader.tokens, np.ndarray)


@pytest.mark.parametrize("mapped", [True, False])
def test_pickled_it_opens_its_file_again(prefix, mapped):
    train = build(prefix, mapped)
    state = train.reader.__getstate__()
    assert "tokens" not in state and "tokens" in train.reader.__dict__
    other = pickle.loads(pickle.dumps(train))
    assert other.dataset is other.reader.dataset  # one map, not two
    for index in range(30):
        sample, expected = other[index], train[index]
        assert all(torch.equal(sample[name], expected[name]) for name in expected)
