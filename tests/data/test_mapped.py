# SPDX-License-Identifier: Apache-2.0
"""Lists of sources, orders and bins that are kept in files: made once, mapped, mended, the same."""

import fcntl
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support import forks

from megatron_cream.data.mapped import ArrayCache, MappedArray, MappedFile
from megatron_cream.errors import UserError
from megatron_cream.ownership import MARK_NAME

N, T = 64, 200
UNITS = ["document", "window", "packed", "packed-documents"]


def numbers(count=1000, block=300):
    return [np.arange(at, min(at + block, count), dtype=np.int32) for at in range(0, count, block)]


def refuse():
    raise AssertionError("made anew")


def test_an_array_is_made_once_and_mapped(tmp_path):
    cache = ArrayCache(str(tmp_path / "new" / "folder"), {"of": "this"})
    first = cache.array("numbers", numbers)
    again = cache.array("numbers", refuse)
    for array in (first, again, pickle.loads(pickle.dumps(again))):
        assert isinstance(array, MappedArray) and array.dtype == np.int32
        assert array.tolist() == list(range(1000))
        assert not array.flags.owndata and not array.flags.writeable
    assert len(pickle.dumps(again)) < 300 < len(pickle.dumps(again[10:]))
    assert pickle.loads(pickle.dumps(again[10:])).tolist() == list(range(10, 1000))
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert np.load(path).tolist() == list(range(1000))  # as any tool reads it


@pytest.mark.parametrize("dtype", ["<i8", [("start", "<i8"), ("followed", "?")]])
def test_no_numbers_are_an_array_too(tmp_path, dtype):
    cache = ArrayCache(str(tmp_path), {})
    cache.array("none", lambda: [np.empty(0, dtype)])
    found = cache.array("none", refuse)
    assert len(found) == 0 and found.dtype == np.dtype(dtype)


def test_what_decides_an_array_names_it(tmp_path):
    for key, more in (({"seed": 1}, {}), ({"seed": 2}, {}), ({"seed": 1}, {"epoch": 0})):
        made = []
        cache = ArrayCache(str(tmp_path), key)
        cache.array("a", lambda made=made: made.append(1) or numbers(), **more)
        assert made
    ArrayCache(str(tmp_path), {"seed": 1}).array("a", refuse, epoch=0)


def truncate(data):
    return data[: len(data) // 2]


def lose_a_block(data):
    return data[:1024] + bytes(1024) + data[2048:]


def lengthen(data):
    return data + bytes(8)


def garble_header(data):
    return b"\x93NUMPY\x01\x00garbage" + data[15:]


@pytest.mark.parametrize(
    "damage", [truncate, lose_a_block, lengthen, garble_header, lambda data: b""]
)
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    cache = ArrayCache(str(tmp_path), {})
    cache.array("numbers", numbers)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cache.array("numbers", numbers).tolist() == list(range(1000))
    assert path.read_bytes() == whole


def test_one_that_fails_leaves_nothing(tmp_path):
    def fail():
        yield from numbers()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        ArrayCache(str(tmp_path), {}).array("numbers", fail)
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_cannot_be_read_is_not_blamed_on_the_folder(tmp_path):
    def fail():
        yield from numbers()
        raise OSError(5, "Input/output error", "text.idx")

    with pytest.raises(OSError, match="text.idx") as found:
        ArrayCache(str(tmp_path), {}).array("numbers", fail)
    assert "data-cache-path" not in str(found.value) and not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Marked as ours, an hour old, and locked by none; all else stays."""

    with pytest.raises(RuntimeError, match="ended without an answer"):
        forks.call(die_while_making, str(tmp_path))
    (left,) = tmp_path.iterdir()
    theirs = tmp_path / "megatron_cream-theirs.partial"
    theirs.mkdir()
    (theirs / "array").touch()
    cache = ArrayCache(str(tmp_path), {})
    cache.array("young", numbers)
    assert left.exists()
    for path in (*left.iterdir(), left, *theirs.iterdir(), theirs):
        os.utime(path, (0, 0))
    with open(left / MARK_NAME) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.array("in the making", numbers)
        assert left.exists()
    cache.array("old", numbers)
    assert not left.exists() and theirs.exists()


def die_while_making(folder):
    def make():
        yield from numbers()
        os._exit(9)

    ArrayCache(folder, {}).array("numbers", make)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache must hold .* --data-cache-path"):
        ArrayCache(str(tmp_path / "file" / "cache"), {}).array("numbers", numbers)


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = sum(pool.map(make_slowly, [str(tmp_path)] * 4))
    assert made == 1 and len(list(tmp_path.iterdir())) == 1


def make_slowly(folder):
    import time

    made = []

    def build():
        made.append(1)
        time.sleep(0.2)
        return numbers()

    assert ArrayCache(folder, {}).array("numbers", build).tolist() == list(range(1000))
    return len(made)


def test_reading_ahead_stays_inside_the_file(tmp_path):
    data = np.arange(100_000, dtype=np.uint16)
    data.tofile(tmp_path / "a")
    file = MappedFile(str(tmp_path / "a"), np.uint16)
    file.read_ahead([(0, 100_000), (70_001, 29_999), (99_999, 1), (5, 0)])
    np.testing.assert_array_equal(file.array, data)


@pytest.fixture
def prefix(tmp_path):
    """A dataset of documents between a quarter of N and three times T."""
    from megatron_cream.corpus.storage import write_index

    lengths = np.random.default_rng(3).integers(N // 4, 3 * T, size=120)
    one = np.ones(len(lengths), dtype=np.int64)
    path = str(tmp_path / "text")
    write_index(path + ".idx", np.dtype(np.uint16), [(lengths, one)], 120, 120)
    np.arange(lengths.sum(), dtype=np.uint16).tofile(path + ".bin")
    return path


def build(prefix, unit, cache=None, samples=300, split="90,10,0"):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_cream.config import ExtensionConfig
    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig
    from megatron_cream.data.packed import PackedSpanDataset

    config = SpanDatasetConfig(
        random_seed=7,
        sequence_length=N,
        blend=([prefix], None),
        split=split,
        path_to_cache=cache,
        extension=ExtensionConfig(N, T, N, sample_unit=unit, position_strategy="pose"),
    )
    kind = PackedSpanDataset if unit == "packed-documents" else SpanDataset
    sizes = [samples, 20, 0]
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()


def keep_all(monkeypatch=None, few=0):
    """Treat every dataset as a large one, or every number above ``few``."""
    from megatron_cream.data import text_sources

    if monkeypatch is None:
        text_sources.FEW = few
    else:
        monkeypatch.setattr(text_sources, "FEW", few)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.usefixtures("cpu_megatron")
def test_samples_are_those_of_lists_in_memory(prefix, unit, monkeypatch):
    expected = build(prefix, unit)
    assert expected[0].sources.cache is None and not os.path.exists(prefix)
    keep_all(monkeypatch)
    build(prefix, unit)
    found = build(prefix, unit)
    assert isinstance(found[0].sources.rows, MappedArray)
    assert found[0].indices == range(108) and found[1].indices == range(108, 120)
    for split in range(2):
        other = pickle.loads(pickle.dumps(found[split]))
        assert len(found[split]) == len(expected[split])
        for index in range(len(expected[split])):
            for name, value in expected[split][index].items():
                assert torch.equal(found[split][index][name], value)
                assert torch.equal(other[index][name], value)


@pytest.mark.usefixtures("cpu_megatron")
def test_from_its_files_a_dataset_starts_without_its_index_and_a_draw(prefix, monkeypatch):
    from megatron_cream.data import dataset, text_sources

    keep_all(monkeypatch)
    folder = prefix + "-cache"
    build(prefix, "window", folder)
    names = sorted(path.name.split("-")[0] for path in Path(folder).iterdir())
    epochs = -(-300 // len(build(prefix, "window", folder)[0].sources))
    assert names == ["order"] * (epochs + 1) + ["sources"] * 2 and epochs > 0
    monkeypatch.setattr(text_sources, "read_index", lambda *_: refuse())
    monkeypatch.setattr(dataset, "draw_order", lambda *_: refuse())
    train = build(prefix, "window", folder)[0]
    for index in range(300):
        train[index]  # nor do its workers


@pytest.mark.usefixtures("cpu_megatron")
def test_many_epochs_of_few_texts_need_no_file_each(prefix, monkeypatch):
    expected = build(prefix, "document", samples=1000)[0]
    keep_all(monkeypatch, few=120)
    folder = prefix + "-cache"
    found = build(prefix, "document", folder, samples=1000)[0]
    assert found.sources.cache and len(found) > 9 * found.epoch_size
    assert {path.name.split("-")[0] for path in Path(folder).iterdir()} == {"sources"}
    assert [found.chosen(i) for i in range(1000)] == [expected.chosen(i) for i in range(1000)]


@pytest.mark.usefixtures("cpu_megatron")
def test_files_of_a_dataset_that_was_written_again_are_not_taken(prefix, monkeypatch):
    keep_all(monkeypatch)
    before = build(prefix, "window")[0].sources.lengths.tolist()
    lengths = np.full(120, os.path.getsize(prefix + ".bin") // 240)
    lengths[-1] += os.path.getsize(prefix + ".bin") // 2 - lengths.sum()
    from megatron_cream.corpus.storage import write_index

    one = np.ones(len(lengths), dtype=np.int64)
    write_index(prefix + ".idx", np.dtype(np.uint16), [(lengths, one)], 120, 120)
    after = build(prefix, "window")[0].sources.lengths.tolist()
    assert after != before and max(after) == min(T, int(lengths[0]))


@pytest.mark.usefixtures("cpu_megatron")
def test_the_order_is_the_one_that_numpy_permutes():
    from megatron_cream.data.dataset import draw_order
    from megatron_cream.positions import philox

    for seed, epoch, size in ((1, 0, 1), (7, 3, 70_000), (1 << 40, 1, 300_001)):
        found = draw_order(seed, epoch, size)
        expected = philox.generator(seed, epoch, 1).permutation(size)
        assert found.dtype == np.int32 and expected.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


def test_rank_0_alone_makes_them(prefix):
    """With and without torch.distributed, which makes the others wait."""
    meeting = prefix + "-meeting"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: forks.call(made_by, rank, prefix, meeting), range(3)))
    assert [made for made, _ in found] == [2 * 3, 0, 0]  # sources, one order, of each split; index
    assert found[0][1] == found[1][1] == found[2][1]


def made_by(rank, prefix, meeting):
    """Return how many times this rank made something, and a sample."""
    import torch.distributed as dist

    from megatron_cream.data import dataset, text_sources

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    keep_all()
    made = []
    for module, name in ((text_sources, "_rows"), (dataset, "draw_order")):
        own = getattr(module, name)
        setattr(module, name, lambda *a, own=own: made.append(1) or own(*a))
    own_read = text_sources.read_index
    text_sources.read_index = lambda *a: made.append(1) or own_read(*a)
    train = build(prefix, "document", samples=20)[0]
    sample = train[3]["tokens"].tolist()
    dist.destroy_process_group()
    return len(made), sample
