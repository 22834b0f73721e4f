# SPDX-License-Identifier: Apache-2.0
import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.corpus import input_files, readers
from megatron_cream.corpus.input_files import InputSpan, lines_before
from megatron_cream.corpus.readers import BadRecord, Fields, read_line, read_span

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)
PARSERS = ["orjson", "json"]


@pytest.fixture(params=PARSERS)
def parser(request, monkeypatch):
    """Both parsers in turn: the result must not depend on which is installed."""
    if request.param == "json":
        monkeypatch.setattr(readers, "orjson", None)
    else:
        pytest.importorskip("orjson")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "x"', readers.BROKEN_JSON),
        (b"[" * 100_000, readers.BROKEN_JSON),
        (b'{"text": "a\tb"}', readers.BROKEN_JSON),
        (b'["x"]', readers.NOT_AN_OBJECT),
        (b"7", readers.NOT_AN_OBJECT),
        (b'{"body": "x"}', readers.MISSING_FIELD),
        (b'{"text": 5}', readers.WRONG_TYPE),
        (b'{"text": null}', readers.WRONG_TYPE),
        (b'{"text": ["x"]}', readers.WRONG_TYPE),
        (b'{"text": "\xff"}', readers.NOT_UTF8),
        (b'{"text": "\xed\xa0\x80"}', readers.NOT_UTF8),
        (b'{"text": "a\\ud800"}', readers.SURROGATE),
        (b'{"text": "a", "other": ["\\udc00"]}', readers.SURROGATE),
        (b'{"text": "a\\u0000"}', readers.NUL),
        (b'{"text": "a\0"}', readers.NUL),
        (b"\0" * 40, readers.NUL),
    ],
)
def test_each_kind_of_bad_line(line, kind):
    with pytest.raises(BadRecord) as caught:
        read_line(line, Fields())
    assert caught.value.kind == kind


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" * 400, "1e999", '"\\ud83c\\udf88"'])
def test_what_the_standard_library_takes_is_taken(value):
    assert read_line(b'{"n": %s, "text": "x"}' % value.encode(), Fields())[0] == "x"


def test_several_fields_are_joined_in_the_order_asked_for():
    line = json.dumps({"body": "B", "title": "T", "n": 1}).encode()
    assert read_line(line, Fields(("title", "body"), " / "))[0] == "T / B"
    with pytest.raises(BadRecord, match="--json-key n: int there, needs a string"):
        read_line(line, Fields(("title", "n")))


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.booleans())
def test_giant_lines_give_the_same_text(texts, escaped):
    line = json.dumps(
        {"a": texts[0], "n": [1, {"x": texts[-1]}], "text": "".join(texts)}, ensure_ascii=escaped
    ).encode()
    fields = Fields(("text", "a"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", 29)
        patch.setattr(readers, "_LONG_STRING_BYTES", 5)
        pieces = list(readers.stream_json_text(line, fields))
    assert "".join(pieces) == "".join(texts) + "\n\n" + texts[0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"a" * 90 + b"\\ud800" + b"b" * 90, readers.SURROGATE),
        (b"a" * 90 + b"\xff" + b"b" * 90, readers.NOT_UTF8),
        (b"a" * 90 + b"\\q" + b"b" * 90, readers.BROKEN_JSON),
        (b"a" * 90 + b"\\u0000" + b"b" * 90, readers.NUL),
        (b"a" * 90 + b"\\u12", readers.BROKEN_JSON),
    ],
)
@pytest.mark.parametrize("key", [b"text", b"other"])
def test_giant_lines_are_checked_as_small_ones(monkeypatch, value, kind, key):
    monkeypatch.setattr(readers, "PIECE_BYTES", 29)
    monkeypatch.setattr(readers, "_LONG_STRING_BYTES", 5)
    line = b'{"%s": "%s", "text": "x"}' % (key, value)
    if key == b"text":
        line = b'{"other": 1, "text": "%s"}' % value
    if kind == readers.NUL and key == b"other":
        assert read_line(line, Fields())[0] == "x"  # NUL is refused in the text only
        return
    for parse in (read_line, lambda *a: list(readers.stream_json_text(*a))):
        with pytest.raises(BadRecord) as caught:
            parse(line, Fields())
        assert caught.value.kind == kind


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"])), max_size=12),
    st.integers(1, 300),
    st.sampled_from([3, 50, 1 << 20]),
)
def test_pieces_of_any_size_give_every_line_once(tmp_path_factory, lines, size, block):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    data = "".join(json.dumps({"text": text}) + end for text, end in lines).encode()
    path.write_bytes(data)
    starts = list(range(0, len(data), size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_files, "_BLOCK_BYTES", block)
        before = lines_before(str(path), starts)
        found = [
            (record.text, first + record.number)
            for first, start in zip(before, starts, strict=True)
            for record in read_span(InputSpan(str(path), "jsonl", start, start + size), Fields())
        ]
    assert [text for text, _ in found] == [text for text, _ in lines]
    rows = data.split(b"\n")
    assert [json.loads(rows[number - 1])["text"] for _, number in found] == [t for t, _ in lines]


@pytest.mark.parametrize("start", [0, 10])
def test_a_byte_order_mark_is_one_at_the_start_of_a_file_only(tmp_path, start):
    """Where a file is cut decides nothing: in its middle the three bytes are part of a line."""
    path = tmp_path / "a.jsonl"
    line = b'{"text": "one"}\n'
    path.write_bytes((b"\xef\xbb\xbf" if not start else b"") + line + b"\xef\xbb\xbf" + line)
    found = list(read_span(InputSpan(str(path), "jsonl", start, path.stat().st_size), Fields()))
    texts = [None if record.error else record.text for record in found]
    assert texts == ([None] if start else ["one", None])
    assert found[-1].error.kind == "broken JSON"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_reading_goes_on_from_any_record(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(name, b"".join(b'{"text": "%d"}\n\n' % i for i in range(50))))
    piece = InputSpan(str(path), "jsonl")
    every = list(read_span(piece, Fields()))
    assert [record.text for record in every] == [str(i) for i in range(50)]
    for i in (0, 1, 30, 49):
        rest = read_span(piece, Fields(), every[i].offset, every[i].number)
        assert list(rest) == every[i + 1 :]


def test_long_files_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONG_BYTES", 1000)
    monkeypatch.setattr(readers, "PIECE_BYTES", 101)
    text = "\ufeff" + "κόσμε 🎈\r\n" * 300
    path = tmp_path / "a.txt"

    def pieces():
        for record in read_span(InputSpan(str(path), "text"), Fields()):
            yield from record.text

    path.write_bytes(text.encode())
    assert "".join(pieces()) == text[1:]
    for tail in (b"\xff tail", b"\xce"):
        path.write_bytes(text.encode() + tail)
        found = pieces()
        assert "".join(islice(found, 5)) == text[1:][: len("".join(islice(pieces(), 5)))]
        with pytest.raises(BadRecord, match=f"byte {len(text.encode())}: not UTF-8"):
            list(found)
    path.write_bytes(text.encode() + b"\0")
    with pytest.raises(BadRecord, match="is NUL"):
        list(pieces())
