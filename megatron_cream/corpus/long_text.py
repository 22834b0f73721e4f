# SPDX-License-Identifier: Apache-2.0
"""Handles texts too long to be in memory whole: read in pieces, encoded stretch by stretch.

One character outside Latin-1 makes Python spend two or four bytes on each. So the JSON of a long
line is checked with its long strings left out; they are decoded while they are tokenized.

A long text is cut so that the ids of its stretches in a row are those of the whole. Two kinds of
tokenizers have such places. One that splits text into words first (a pre-tokenizer)
never merges across words: the text is cut between two words, and each cut is tried on the real
pre-tokenizer. One that marks word starts with U+2581 and knows a line end only as a byte never
merges across a line end: the text is cut before it, and the mark that the tokenizer puts before
every text is taken off again. Tokenizers of neither kind get long texts whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from megatron_cream.corpus.records import (
    BAD_MASK,
    BROKEN_JSON,
    NOT_UTF8,
    BadRecord,
    Fields,
    Line,
    parse,
    strings_of,
    validate_text,
)
from megatron_cream.corpus.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

LONG_BYTES = 32 << 20
"""Lines and files longer than this are read in pieces."""

PIECE_BYTES = 4 << 20

# A string of JSON from quote to quote; possessive, or a long one would be remembered step by step.
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_LONG_STRING_BYTES = 1 << 20
# What is never cut: an escape, a pair of escapes that spell one character.
_WHOLE = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB]..\\u....|\\u(?![dD][89abAB])....|\\[^u])*+", re.DOTALL
)


def stream_json_text(line: Line, fields: Fields) -> Iterator[str]:
    """Yield the text of one long line of JSONL; together they are what ``read_line`` gives.

    Raises:
        BadRecord: as ``read_line``, at once or after some pieces.
    """
    if fields.mask is not None:
        raise BadRecord(
            BAD_MASK,
            f"a line of {len(line)} bytes cannot have a mask, needs at most {LONG_BYTES}",
        )
    spans: list[tuple[int, int]] = []

    def shorten(found: re.Match[bytes]) -> bytes:
        start, end = found.span(1)
        if end - start < _LONG_STRING_BYTES:
            return found.group()
        spans.append((start, end))
        return json.dumps(_placeholder(len(spans) - 1)).encode()

    values = strings_of(parse(_STRING.sub(shorten, line)), fields)
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
            yield validate_text(value)


def stream_plain_text(stream: BinaryIO, first: bytes) -> Iterator[str]:
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
            raise BadRecord(NOT_UTF8, detail) from exc
        yield validate_text(text)
        if not data:
            return
        start += waiting + len(data) - len(decoder.getstate()[0])
        data = stream.read(PIECE_BYTES)


def _placeholder(index: int) -> str:
    return f"\0 long string {index}"  # a text with NUL is refused, so no text is taken for this


def _pieces(line: Line, start: int, end: int) -> Iterator[str]:
    view = memoryview(line)
    while start < end:
        window = view[start : min(start + PIECE_BYTES, end)]
        size = len(window)
        if start + size < end:
            whole = _WHOLE.match(window)
            size = (whole.end() if whole else 0) or size
            while size > 1 and view[start + size] & 0xC0 == 0x80:
                size -= 1
        yield _unescaped(window[:size])
        start += size


def _unescaped(piece: memoryview) -> str:
    try:
        text = parse(b'"%b"' % bytes(piece))
    except BadRecord as exc:
        if exc.kind != BROKEN_JSON:
            raise
        raise BadRecord(BROKEN_JSON, f"broken JSON in a long string ({exc})") from exc
    return validate_text(text)


CUT_CHARACTERS = 1 << 20
"""Texts longer than this are encoded in stretches of about this size."""

_SEARCHED = (1 << 11, 1 << 16)
_CONTEXT = 256
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W_])")
_BEFORE_LINE_END = re.compile(r"(?<=[^\n])(?=\n)")


@dataclass(frozen=True)
class TextSplitter:
    """Finds cuts for one tokenizer.

    Attributes:
        pattern: matches, with no width, where a cut may be.
        dropped: ids at the start of each stretch but the first that the whole does not have.
        holds: whether a cut between two stretches of text changes nothing.
    """

    pattern: re.Pattern[str]
    dropped: int
    holds: Callable[[str, str], bool]

    def last(self, text: str, start: int, end: int) -> int | None:
        """Return the last cut of ``text[start:end]``, None without one."""
        for found in reversed(list(self.pattern.finditer(text, start, end))):
            at = found.start()
            if self.holds(text[max(at - _CONTEXT, 0) : at], text[at : at + _CONTEXT]):
                return at
        return None


def find_text_splitter(tokenizer: Tokenizer) -> TextSplitter | None:
    """Return how texts may be cut for ``tokenizer``, None if they may not."""
    tokenizer = getattr(tokenizer, "reference", tokenizer)  # of a fast one
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _line_splitter(tokenizer, tokenizer.pieces)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return TextSplitter(re.compile(""), 0, lambda left, right: True)
    description = tokenizer.description
    if description["model"].get("type") != "BPE" or not _plain_added_tokens(description):
        return None
    if description.get("pre_tokenizer") is None:
        return _line_splitter(tokenizer, list(description["model"]["vocab"]))
    normalizer = description.get("normalizer")
    if normalizer is not None and normalizer.get("type") not in ("NFC", "NFKC"):
        return None
    return TextSplitter(
        _BETWEEN_WORDS, 0, lambda left, right: _between_words(tokenizer, left, right)
    )


def encode_pieces(
    tokenizer: Tokenizer, splitter: TextSplitter | None, pieces: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yield the ids of a text that comes in pieces, cut anywhere, ``[tokens]`` at a time."""
    first = True
    for stretch in _cut_anew(splitter, pieces):
        (ids,) = tokenizer.encode([stretch])
        yield ids if first or splitter is None else ids[splitter.dropped :]
        first = False


def encode_long(tokenizer: Tokenizer, splitter: TextSplitter | None, text: str) -> np.ndarray:
    """Return the ids of a text, encoded in stretches where it is long."""
    starts = range(0, len(text), CUT_CHARACTERS)
    pieces = (text[start : start + CUT_CHARACTERS] for start in starts)
    return np.concatenate(list(encode_pieces(tokenizer, splitter, pieces)))


def _cut_anew(splitter: TextSplitter | None, pieces: Iterable[str]) -> Iterator[str]:
    """Cut a text of many pieces anew, where ``splitter`` says."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if splitter is None or size < CUT_CHARACTERS:
            continue
        text = "".join(waiting)
        tries = (splitter.last(text, max(size - far, 1), size - _CONTEXT) for far in _SEARCHED)
        at = next(filter(None, tries), None)
        if at is None:
            waiting = [text]
            continue
        yield text[:at]
        waiting, size = [text[at:]], size - at
    yield "".join(waiting)


def _plain_added_tokens(description: dict[str, Any]) -> bool:
    """Say whether no added token can reach across a cut."""
    for token in description.get("added_tokens") or []:
        content = token["content"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            return False
        if "\n" in content or content == " " or (" " in content and content.strip()):
            return False
    return True


def _between_words(tokenizer: HuggingFaceTokenizer, left: str, right: str) -> bool:
    whole = tokenizer.words(left + right)
    before, after = tokenizer.words(left), tokenizer.words(right)
    return whole == before + after


def _line_splitter(tokenizer: Tokenizer, pieces: list[str]) -> TextSplitter | None:
    if any("\n" in piece for piece in pieces):
        return None
    line_end, twice, spaced, plain = (
        ids.tolist() for ids in tokenizer.encode(["\n", "\n\n", "a  b ", "a b"])
    )
    # Of a line end: the mark, then one byte. Spaces must not be removed either.
    if len(line_end) != 2 or twice != [*line_end, line_end[1]]:
        return None
    if len(spaced) <= len(plain):
        return None
    return TextSplitter(_BEFORE_LINE_END, 1, lambda left, right: True)
