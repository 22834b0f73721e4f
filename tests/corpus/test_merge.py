# SPDX-License-Identifier: Apache-2.0
"""Shards, duplicates, length limits, other inputs: the same bytes whichever way."""

import glob
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_cream.corpus import merge
from megatron_cream.corpus.encode import split
from megatron_cream.corpus.inspection import (
    check,
    count_lengths,
    describe,
    document_text,
    draw_histogram,
    median,
)
from megatron_cream.corpus.job import plan_job
from megatron_cream.corpus.merge import first_copies, merge_datasets
from megatron_cream.corpus.storage import HASH_BYTES, Segment, write_index
from megatron_cream.data import indexed
from megatron_cream.data.indexed import read_index, read_metadata, token_dtype

PARTS = {"part_bytes": 200}


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"drop_duplicates": True},
        {"max_tokens": 7, "append_eod": True},
        {"max_tokens": 7, "long_documents": "drop", "on_error": "skip", "seq_length": 5},
    ],
)
def test_shards_make_the_same_dataset(job, run, outputs, count, changes):
    with open(job.input[0], "a") as file:
        file.write("{broken\n" if "on_error" in changes else "\n")
    run(job, **changes)
    for index in reversed(range(count)):
        run(job, shard=(index, count), **changes, **PARTS)
    shards = [name[:-4] for name in glob.glob(f"{job.output_prefix}-*.idx")]
    merged = job.output_prefix + "-merged"
    merge_datasets(shards, merged)
    assert outputs(merged) == outputs(job.output_prefix)
    with pytest.raises(ValueError, match=r"of \d+, without \[\d+\], needs each of them once"):
        merge_datasets(shards[1:], merged, overwrite=True)
    with pytest.raises(ValueError, match="with one given twice"):
        merge_datasets([*shards, shards[0]], merged, overwrite=True)
    assert "finished before: " in merge_datasets(shards, merged)
    with pytest.raises(ValueError, match="exists, needs a new prefix or --overwrite"):
        merge_datasets(shards[1:], merged)


def test_shards_of_other_jobs_do_not_go_together(job, run):
    run(job, shard=(0, 2))
    run(job, shard=(1, 2), min_tokens=2)
    prefixes = [f"{job.output_prefix}-0000{i}-of-00002" for i in range(2)]
    with pytest.raises(ValueError, match="shards go together with all other shards of the same"):
        merge_datasets(prefixes, job.output_prefix)
    assert not Path(job.output_prefix + ".parts").exists()


def test_merging_other_datasets_keeps_their_order(job, run, tmp_path):
    prefixes = []
    for i, text in enumerate(("first", "second", "third")):
        path = tmp_path / f"{i}.txt"
        path.write_text(text)
        prefixes.append(str(tmp_path / "out" / str(i)))
        run(job, input=(str(path),), output_prefix=prefixes[-1])
    Path(prefixes[1] + ".json").unlink()
    merge_datasets(prefixes[::-1], job.output_prefix)
    assert np.fromfile(job.output_prefix + ".bin", "<u2").astype("u1").tobytes() == (
        b"thirdsecondfirst"
    )
    assert read_metadata(job.output_prefix) is None
    content = json.loads(Path(prefixes[2] + ".json").read_text())
    Path(prefixes[2] + ".json").write_text(json.dumps({**content, "eod_id": 7}))
    with pytest.raises(ValueError, match="2: has eod_id 7, needs 256 as "):
        merge_datasets([prefixes[0], prefixes[2]], job.output_prefix, overwrite=True)


def test_split_documents_have_the_same_tokens(job, run, outputs, cpu_megatron):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    run(job, append_eod=True)
    prefix = job.output_prefix + "-split"
    run(job, append_eod=True, max_tokens=100, output_prefix=prefix)
    assert outputs(prefix)[".bin"] == outputs(job.output_prefix)[".bin"]
    whole, pieces = IndexedDataset(job.output_prefix), IndexedDataset(prefix)
    assert pieces.sequence_lengths.max() == 101
    assert pieces.sequence_lengths.tolist()[3:6] == [100, 100, 101]
    builder = IndexedDatasetBuilder(prefix + "-theirs.bin", dtype=np.uint16)
    for row in whole[:]:
        content = len(row) - 1
        counts = [100] * (content // 100) + [content % 100] * (content % 100 > 0)
        counts[-1] += 1
        builder.add_document(row, counts)
    builder.finalize(prefix + "-theirs.idx")
    assert outputs(prefix)[".idx"] == Path(prefix + "-theirs.idx").read_bytes()
    note = read_metadata(prefix)
    assert (note["documents"], note["sequences"]) == (12, 12 + 3 * 2)


def test_split_keeps_every_token_and_limit():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, size=500) + 2
    for limit in (1, 7, 58, 1000):
        sequences, counts = split(lengths, limit, head=1, tail=1)
        owners = np.repeat(np.arange(500), counts)
        np.testing.assert_array_equal(np.bincount(owners, sequences).astype(int), lengths)
        assert sequences.max() <= limit + 2 and sequences.min() >= 1


def test_bos_is_in_the_first_sequence_and_eod_in_the_last():
    lengths = np.array([12, 2, 6, 7])  # with both: 10, 0, 4 and 5 of their own
    sequences, counts = split(lengths, 4, head=1, tail=1)
    assert sequences.tolist() == [5, 4, 3, 2, 6, 5, 2]
    assert counts.tolist() == [3, 1, 1, 2]


def test_long_documents_are_dropped_on_request(job, run):
    stats = run(job, max_tokens=10, long_documents="drop")
    assert stats.metadata["dropped"]["longer_than_max_tokens"] == 3
    assert stats.longest_document == 10
    with pytest.raises(ValueError, match="--min-tokens 11: none of the 12 documents is left"):
        run(job, min_tokens=11, max_tokens=299, long_documents="drop", overwrite=True)


def test_duplicates_keep_their_first_copy(job, run, documents, monkeypatch):
    stats = run(job, drop_duplicates=True, **PARTS)
    data = np.fromfile(job.output_prefix + ".bin", "<u2").astype("u1").tobytes()
    assert data == "".join(documents[:5]).encode()
    assert stats.metadata["dropped"]["duplicates"] == 8


@pytest.mark.parametrize("bucket_bytes", [1 << 28, 3000, 300])
def test_first_copies_equal_a_dictionary(monkeypatch, tmp_path, bucket_bytes):
    """Of hashes that are read once, in files or not; nothing is left of these."""
    monkeypatch.setattr(merge, "_BUCKET_BYTES", bucket_bytes)
    rng = np.random.default_rng(3)
    step = np.array([(1 << 64) // 8, 1], dtype="<u8")  # over the whole range
    rows = [rng.integers(0, 8, size=(n, 2)).astype("<u8") * step for n in (10, 0, 133, 5)]
    read = []
    segments = [
        Segment("", len(r), None, lambda r=r: read.append(1) or r.view(f"V{HASH_BYTES}").ravel())
        for r in rows
    ]
    seen, expected = set(), []
    for row in np.concatenate(rows).tolist():
        expected.append(tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_copies(segments, str(tmp_path)).tolist() == expected
    assert len(read) == len(segments) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["parquet", "arrow file", "arrow stream"])
def test_columns_give_the_same_documents(job, run, content, tmp_path, documents, format):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    run(job)
    table = pa.table({"n": range(15), "text": documents})
    path = tmp_path / f"t.{format.split()[0]}"
    if format == "parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        make = pa.ipc.new_file if format.endswith("file") else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    prefix = job.output_prefix + "-columns"
    run(job, input=(str(path),), output_prefix=prefix, **PARTS)
    assert content(prefix) == content(job.output_prefix)
    for changes, message in (
        ({"json_key": "body"}, "--json-key body: no such column, needs one of n, text"),
        ({"json_key": "n"}, "--json-key n: a column of int64, needs text"),
    ):
        with pytest.raises(ValueError, match=message):
            run(job, input=(str(path),), output_prefix=prefix, overwrite=True, **changes)
    data = path.read_bytes()
    for left in (len(data) - 4, len(data) // 2, 5):
        path.write_bytes(data[:left])
        with pytest.raises(ValueError, match=rf"{path}: broken {format.split()[0]} data"):
            run(job, input=(str(path),), output_prefix=prefix, overwrite=True)


def test_bad_rows_are_named(job, run, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    values = [b"good", None, b"\xff", b"a\0", b"better"]
    pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), path)
    config = replace(job, input=(str(path),))
    with pytest.raises(ValueError, match=r"t\.parquet: row 2: --json-key text: NoneType there"):
        run(config)
    stats = run(config, on_error="skip")
    assert stats.metadata["errors"] == {"wrong type": 1, "invalid UTF-8": 1, "NUL": 1}
    assert stats.documents == 2


def test_standard_input_and_patterns(job, run, content, tmp_path, monkeypatch):
    run(job)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code = "import sys; from megatron_cream.corpus.preprocess import *"
    code += f"; preprocess(PreprocessConfig(('-',), 'ByteLevelTokenizer', {str(tmp_path / 'o')!r}))"
    import subprocess

    with open(job.input[0], "rb") as file:
        subprocess.run([sys.executable, "-c", code], stdin=file, check=True, capture_output=True)
    assert content(tmp_path / "o") == content(job.output_prefix)
    (tmp_path / "sub").mkdir()
    Path(job.input[0]).rename(tmp_path / "sub" / "x.data")
    prefix = job.output_prefix + "-pattern"
    pattern = str(tmp_path / "**" / "*.data")
    run(job, input=(pattern,), input_format="jsonl", output_prefix=prefix)
    assert content(prefix) == content(job.output_prefix)
    with pytest.raises(FileNotFoundError, match="no file matches, needs one that does"):
        run(job, input=(str(tmp_path / "*.none"),), output_prefix=prefix, overwrite=True)


def test_index_equals_megatrons_builder(tmp_path, cpu_megatron):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    for dtype in (np.uint16, np.int32):
        builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
        blocks = []
        for _ in range(5):
            counts = rng.integers(0, 4, size=7)
            lengths = rng.integers(1, 900, size=counts.sum())
            blocks.append((lengths, counts))
            for owned in np.split(lengths, np.cumsum(counts)[:-1]):
                builder.add_document(np.zeros(owned.sum()), owned.tolist())
        builder.finalize(str(tmp_path / "a.idx"))
        sequences = sum(len(lengths) for lengths, _ in blocks)
        write_index(tmp_path / "b.idx", np.dtype(dtype), blocks, sequences, 35)
        assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    for size in (1, 257, 65499, 65500, 65536, 200_000):
        assert token_dtype(size) == DType.optimal_dtype(size)


def test_inspection_says_what_is_there(job, run):
    run(job, append_eod=True, max_tokens=100)
    text = describe(job.output_prefix, (100, 301))
    assert "documents: 12\nsequences: 18\n" in text
    assert "sequences of at least 100 tokens: 50.0%" in text
    assert "eod 256 after each document, bos None not added" in text
    assert check(job.output_prefix).startswith("sound: ")
    assert document_text(job.output_prefix, 1, None, None, 0) == "κόσμε"
    assert document_text(job.output_prefix, 3, None, None, 7) == "x" * 7
    with pytest.raises(ValueError, match="--document 12: needs 0 to 11"):
        document_text(job.output_prefix, 12, None, None, 0)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", lambda data: data[:-1], r"\.bin is truncated"),
        (".bin", lambda data: data + b"xx", r"\.bin has \d+ bytes and its index accounts for"),
        (".bin", lambda data: data[:-2] + b"\xff\xff", "holds token 65535, needs all below"),
        (".idx", lambda data: data[:-1], r"\.idx is truncated"),
        (".idx", lambda data: data[:34] + b"\x02\0\0\0" + data[38:], "sequence 1 does not follow"),
        (".idx", lambda data: data[:-8] + bytes(8), "its documents do not cover its sequences"),
    ],
)
def test_damage_is_found(job, run, suffix, damage, message):
    run(job)
    path = Path(job.output_prefix + suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        check(job.output_prefix)


def test_lengths_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", 150)
    rng = np.random.default_rng(0)
    for count in (1, 2, 999, 1000):
        lengths = rng.integers(1, 1 << 20, size=count).astype(np.int32)
        counted = count_lengths(lengths, (100, 5000))
        edges = 2 ** np.arange(22)
        expected = np.histogram(lengths, edges)[0]
        histogram = list(counted["documents_by_length"].values())
        assert histogram == np.trim_zeros(expected, "b").tolist()
        shares = {str(n): (lengths >= n).mean() for n in (100, 5000)}
        assert counted["share_at_least"] == shares
        assert (counted["tokens"], counted["longest_document"]) == (lengths.sum(), lengths.max())
        assert counted["median_document"] == median(lengths) == np.median(lengths)
    assert count_lengths(np.array([2, 3, 4, 4]), (3,))["share_at_least"] == {"3": 0.75}
    assert median(np.array([], dtype=np.int32)) == 0
    picture = draw_histogram({"1": 2, "2": 0, "4": 1})
    assert picture.splitlines()[0].endswith(" " + "#" * 40)
    assert picture.splitlines()[2].split() == ["4", "to", "7", "1", "#" * 20]


def test_shards_share_the_bytes(job):
    Path(job.input[0]).write_text('{"text": "some text of a line"}\n' * 200)
    owned = []
    for index in range(5):
        planned = plan_job(replace(job, shard=(index, 5), part_bytes=100))[0]
        owned.append(planned.own_units())
    assert sorted(unit for units in owned for unit in units) == list(range(len(planned.units)))
    sizes = [sum(units.values()) for units in owned]
    assert max(sizes) - min(sizes) <= 100


def test_index_of_an_empty_shard(job, run):
    run(job, shard=(7, 8))
    prefix = job.output_prefix + "-00007-of-00008"
    assert len(read_index(prefix, empty=True).lengths) == 0
    with pytest.raises(ValueError, match="holds no documents"):
        read_index(prefix)
