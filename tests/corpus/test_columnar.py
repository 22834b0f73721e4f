# SPDX-License-Identifier: Apache-2.0
"""Damaged columns: an error that names the file, never memory beyond them."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cream.corpus.input_files import InputSpan
from megatron_cream.corpus.readers import Fields, read_span
from megatron_cream.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["alpha", "beta gamma", "delta", "ε", "zeta" * 9]
TYPES = {"string": pa.string(), "large": pa.large_string(), "binary": pa.binary()}
TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


def write(path, column, kind="file"):
    table = pa.table({"text": column})
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def read(path):
    format = "parquet" if path.suffix == ".parquet" else "arrow"
    return [record.text for record in read_span(InputSpan(str(path), format), Fields())]


def with_offset(path, name, i, value):
    """The file with offset ``i`` of its column replaced."""
    code = "<q" if name == "large" else "<i"
    lengths = [len(text.encode()) for text in TEXTS]
    offsets = [sum(lengths[:k]) for k in range(len(TEXTS) + 1)]
    data = bytearray(path.read_bytes())
    at = data.index(b"".join(struct.pack(code, offset) for offset in offsets))
    struct.pack_into(code, data, at + struct.calcsize(code) * i, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [-1, 1000, 1 << 20])
def test_offsets_are_looked_at_before_they_are_followed(tmp_path, kind, name, value):
    for i in (0, 2, len(TEXTS)):
        path = write(tmp_path / "t.arrow", pa.array(TEXTS, TYPES[name]), kind)
        assert read(path) == TEXTS
        with pytest.raises(UserError, match=r"t\.arrow: broken arrow data \(.*ffset"):
            read(with_offset(path, name, i, value))


def test_an_offset_far_outside_is_one_line(tmp_path):
    path = with_offset(
        write(tmp_path / "t.arrow", pa.array(TEXTS)), "string", len(TEXTS), (1 << 31) - 1
    )
    command = [sys.executable, str(TOOL), "--input", str(path), "--tokenizer-type"]
    command += ["ByteLevelTokenizer", "--output-prefix", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}: broken arrow data (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.arrow"]


def test_indices_of_a_dictionary_are_looked_at(tmp_path):
    column = pa.array(["one", "two", "one"]).dictionary_encode()
    path = write(tmp_path / "t.arrow", column)
    assert read(path) == ["one", "two", "one"]
    data = path.read_bytes()
    assert data.count(struct.pack("<3i", 0, 1, 0)) == 1
    path.write_bytes(data.replace(struct.pack("<3i", 0, 1, 0), struct.pack("<3i", 0, 7, 0)))
    with pytest.raises(UserError, match=r"t\.arrow: broken arrow data"):
        read(path)


def test_every_kind_of_text_is_read(tmp_path):
    for kind in (*TYPES.values(), pa.large_binary(), pa.string_view()):
        assert read(write(tmp_path / "t.arrow", pa.array(TEXTS, kind))) == TEXTS
    slices = pa.chunked_array([pa.array(["no", *TEXTS, None]).slice(1, 5)])
    assert read(write(tmp_path / "t.arrow", slices)) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_any_damage_names_the_file(tmp_path, kind):
    """Bytes changed anywhere: an error with the name, or rows."""
    rng = random.Random(4)
    texts = ["".join(rng.choices("abcdef ", k=rng.randrange(60))) for _ in range(50)]
    path = tmp_path / ("t.parquet" if kind == "parquet" else "t.arrow")
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, write_page_checksum=True)
    else:
        write(path, pa.array(texts), kind)
    whole, errors = path.read_bytes(), 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)
            errors += 1
    assert errors > 20
