# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from megatron_cream.positions import make_strategy

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 256, 2048


@pytest.fixture
def repetition():
    from megatron_cream.training.start_block import repetition

    return repetition


def sources(unit, strategy, documents=20, tokens=4 * T):
    from megatron_cream.data.indexed import DatasetIndex
    from megatron_cream.data.text_sources import make_sources

    starts = np.arange(documents, dtype=np.int64) * tokens
    lengths = np.full(documents, tokens)
    index = DatasetIndex("none", np.dtype(np.uint8), lengths, starts, starts)
    return make_sources(unit, index, range(documents), strategy)


def counted(unit, strategy, found, epochs):
    """Every token, as a run of whole epochs reads it."""
    times = np.zeros(int(found.ends.max()), dtype=int)
    for epoch in range(epochs):
        for source in range(len(found)):
            layout = strategy.layout(9, epoch * len(found) + source)
            for offset, length in layout.spans(int(found.lengths[source])):
                first = int(found.starts[source]) + offset
                times[first : first + length] += 1
    return (times > 0).mean(), times.max()


@pytest.mark.parametrize("unit", ["window", "document"])
@pytest.mark.parametrize("name", ["full", "cream", "pose"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_agrees_with_counting_every_token(repetition, name, unit, epochs):
    strategy = make_strategy(name, train_length=N, target_length=T)
    found = sources(unit, strategy)
    result = repetition(found, epochs, lambda source, draw: strategy.layout(9, draw))
    share, most = counted(unit, strategy, found, epochs)
    assert result.share == pytest.approx(share, rel=0.1)
    assert result.most == most


def test_windows_read_all_text_before_any_twice_and_documents_do_not(repetition):
    plain = make_strategy("full", train_length=N, target_length=T)

    def read(unit, samples):
        found = sources(unit, plain)
        return repetition(found, samples / len(found), lambda source, draw: plain.layout(9, draw))

    samples = 20 * 4 * T // N
    window, document = read("window", samples), read("document", samples)
    assert (window.share, window.most) == (1.0, 1)
    assert (document.share, document.most) == (N / (4 * T), 4 * T // N)


def test_a_part_of_an_epoch_reads_its_part(repetition):
    plain = make_strategy("full", train_length=N, target_length=T)
    found = sources("window", plain)
    result = repetition(found, 0.25, lambda source, draw: plain.layout(9, draw))
    assert result.share == pytest.approx(0.25, abs=0.01)
    assert result.most == 1
    many = repetition(found, 1000, lambda source, draw: plain.layout(9, draw))
    assert (many.share, many.most) == (1.0, 1000)
