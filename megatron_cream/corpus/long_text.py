# SPDX-License-Identifier: Apache-2.0
"""Lines and files of hundreds of megabytes, as text in pieces of a few.

The JSON of such a line is checked with its long strings left out; they are decoded piece by piece
while they are tokenized.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from megatron_cream.corpus import jsonl
from megatron_cream.corpus.jsonl import BadRecord, Fields, Line

# A string of JSON from quote to quote; possessive, or a long one would be remembered step by step.
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_LONG = 1 << 20
# What is never cut: an escape, a pair of escapes that spell one character.
_WHOLE = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB]..\\u....|\\u(?![dD][89abAB])....|\\[^u])*+", re.DOTALL
)


def giant_text(line: Line, fields: Fields) -> Iterator[str]:
    """Yield the text of one long line of JSONL; together they are what ``text_of`` gives.

    Raises:
        BadRecord: as ``text_of``, at once or after some pieces.
    """
    spans: list[tuple[int, int]] = []

    def shorten(found: re.Match[bytes]) -> bytes:
        start, end = found.span(1)
        if end - start < _LONG:
            return found.group()
        spans.append((start, end))
        return json.dumps(_placeholder(len(spans) - 1)).encode()

    values = jsonl.strings_of(jsonl.parse(_STRING.sub(shorten, line)), fields)
    places = {_placeholder(i): span for i, span in enumerate(spans)}
    for other in places.keys() - set(values):
        for _ in _pieces(line, *places[other]):
            pass
    for i, value in enumerate(values):
        if i:
            yield fields.separator
        if value in places:
            yield from _pieces(line, *places[value])
        else:
            yield jsonl.check_text(value)


def stream_text(stream: BinaryIO, first: bytes) -> Iterator[str]:
    """Yield the text of a plain file: ``first``, its first bytes, and what is left in ``stream``.

    Raises:
        BadRecord: it is not UTF-8, or holds NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    data = first.removeprefix(codecs.BOM_UTF8)
    start = len(first) - len(data)  # of what the decoder has not given out yet
    while True:
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as exc:
            detail = f"byte {start + exc.start}: not UTF-8 ({exc.reason})"
            raise BadRecord(jsonl.NOT_UTF8, detail) from exc
        yield jsonl.check_text(text)
        if not data:
            return
        start += waiting + len(data) - len(decoder.getstate()[0])
        data = stream.read(jsonl.PIECE_BYTES)


def _placeholder(index: int) -> str:
    return f"\0 long string {index}"  # a text with NUL is refused, so no text is taken for this


def _pieces(line: Line, start: int, end: int) -> Iterator[str]:
    view = memoryview(line)
    while start < end:
        window = view[start : min(start + jsonl.PIECE_BYTES, end)]
        size = len(window)
        if start + size < end:
            size = _WHOLE.match(window).end() or size
            while size > 1 and view[start + size] & 0xC0 == 0x80:
                size -= 1
        yield _unescaped(window[:size])
        start += size


def _unescaped(piece: memoryview) -> str:
    try:
        text = jsonl.parse(b'"%b"' % bytes(piece))
    except BadRecord as exc:
        if exc.kind != jsonl.BROKEN_JSON:
            raise
        raise BadRecord(jsonl.BROKEN_JSON, f"broken JSON in a long string ({exc})") from exc
    return jsonl.check_text(text)
