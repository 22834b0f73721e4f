# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_cream.corpus.input_files import find_inputs
from megatron_cream.corpus.readers import read_documents

DOCUMENTS = ["first\r\nline\n", "κόσμε <b>", "", "a\u2028b\u0085c"]


def jsonl(documents, key="text"):
    return "".join(json.dumps({key: d, "id": 1}) + "\n" for d in documents).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSONL", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_gives_one_document_a_line(tmp_path, name):
    path = write(tmp_path / name, jsonl(DOCUMENTS) + b"\n  \n" + jsonl(["last"]).rstrip())
    assert list(read_documents(path)) == [*DOCUMENTS, "last"]


@pytest.mark.parametrize("name", ["a.txt", "a.log", "README", "a.md.gz", "a.rst.zst", "a.gz"])
def test_plain_text_is_one_document_unchanged(tmp_path, name):
    text = "one\r\ntwo\n\n{not json}\nκ"
    assert list(read_documents(write(tmp_path / name, text.encode()))) == [text]


def test_other_key_and_byte_order_mark(tmp_path):
    data = b"\xef\xbb\xbf" + jsonl(["x"], key="content")
    assert list(read_documents(write(tmp_path / "a.jsonl", data), "content")) == ["x"]
    assert list(read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfx"))) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_progress_counts_the_bytes_on_disk(tmp_path, name):
    path = write(tmp_path / name, b"some text " * 20000)
    counts = []
    list(read_documents(path, on_bytes=counts.append))
    assert sum(counts) == path.stat().st_size


def test_compressed_streams_joined_end_to_end_are_read_whole(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(b"one " * 9000) + pack(b"two " * 9000))
        assert list(read_documents(path)) == ["one " * 9000 + "two " * 9000]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda d: d[:-5], lambda d: d[: len(d) // 2], lambda d: b"no!"])
def test_damaged_compression_is_an_error_with_file_and_byte(tmp_path, suffix, damage):
    path = write(tmp_path / f"a.txt{suffix}", bytes(range(65, 91)) * 10)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.txt\{suffix}: byte \d+: broken compressed data"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 3: broken JSON"),
        (b"[" * 100_000, "line 3: broken JSON"),
        (b'["x"]', "line 3: a list, needs one JSON object"),
        (b'{"body": "x"}', "line 3: --json-key text: nothing there, needs a string"),
        (b'{"text": 5}', "line 3: --json-key text: int there, needs a string"),
        (b'{"text": "\xff"}', "line 3: byte 10: not UTF-8"),
        (b'{"text": "a\\ud800"}', "line 3: character 1 is half a surrogate"),
    ],
)
def test_broken_line_is_an_error_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", jsonl(["fine"]) + b"\n" + line + b"\n")
    reader = read_documents(path)
    assert next(reader) == "fine"
    with pytest.raises(ValueError) as caught:
        next(reader)
    assert f"{path}: {message}" in str(caught.value)


def test_text_that_is_not_utf8_is_an_error_with_file_and_byte(tmp_path):
    path = write(tmp_path / "a.txt", b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt: byte 3: not UTF-8"):
        list(read_documents(path))


def test_folders_are_sorted_and_other_kinds_counted(tmp_path):
    taken = ["a.txt", "b/c.md.gz", "b/d.jsonl.zst", "e.py", "f.rst"]
    for name in [*reversed(taken), "b/x.bin", "x.json", "x.tar.gz", "noext"]:
        write(tmp_path / "in" / name, b"x")
    single = write(tmp_path / "0.log", b"12345")
    inputs = find_inputs([tmp_path / "in", str(single)])
    assert list(inputs.files) == [*(tmp_path / "in" / name for name in taken), single]
    assert inputs.skipped == 4
    assert inputs.total_bytes == sum(path.stat().st_size for path in inputs.files)


def test_inputs_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="--input .*missing: not found, needs"):
        find_inputs([tmp_path / "missing"])
    write(tmp_path / "x.bin", b"x")
    with pytest.raises(ValueError, match=r"--input .*no files to read \(1 of other kinds"):
        find_inputs([tmp_path])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.txt: not a regular file"):
        find_inputs([tmp_path])


def test_missing_zstandard_is_named_before_reading(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.zst", b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.txt\.zst: needs .*pip install zstandard"):
        find_inputs([path])
