# SPDX-License-Identifier: Apache-2.0
"""Tokenizes with gigatoken: the same ids, some fifty times as fast as from the reference library.

gigatoken is optional and may refuse a tokenizer; whether its ids are the same is checked on text,
not believed (``verify``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_cream.corpus.split_points import TextSplitter, find_text_splitter
from megatron_cream.corpus.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

CACHE_BYTES = 256 << 20
"""A tokenizer whose cache of words has made the process grow by this much is loaded anew."""

_CHECK_CHARACTERS = 8 << 20
_REPAIR_CHARACTERS = 1 << 10


class GigatokenUnsupported(Exception):
    """Why gigatoken cannot be used for a tokenizer."""


@dataclass(frozen=True)
class GigatokenSource:
    """What gigatoken loads; made once, and sent to the worker processes.

    Attributes:
        name, vocab_size, eod, bos: of the reference tokenizer.
        json: a tokenizer.json.
        missing: a regular expression of the characters the vocabulary lacks a byte of, or "".
    """

    name: str
    vocab_size: int
    eod: int | None
    bos: int | None
    json: str = field(repr=False)
    missing: str


def gigatoken_source(reference: Tokenizer) -> GigatokenSource:
    """Return what gigatoken needs to stand in for ``reference``.

    Raises:
        GigatokenUnsupported: gigatoken is not installed, or does not take this tokenizer.
    """
    try:
        import gigatoken  # noqa: F401
    except ImportError as exc:
        raise GigatokenUnsupported("gigatoken is not installed (`pip install gigatoken`)") from exc
    missing = ""
    if isinstance(reference, SentencePieceTokenizer):
        source = _sentencepiece_source(reference)
    elif isinstance(reference, HuggingFaceTokenizer):
        source, missing = _with_every_byte(reference.description, reference.vocab_size)
    else:
        raise GigatokenUnsupported(f"{reference.name} needs no library")
    return GigatokenSource(
        reference.name, reference.vocab_size, reference.eod, reference.bos, source, missing
    )


class GigatokenTokenizer:
    """gigatoken behind the ``Tokenizer`` protocol.

    Some vocabularies lack a byte (most lack those that UTF-8 never has), which gigatoken refuses
    and the reference leaves out. Such bytes get ids past the vocabulary here; text in which one
    comes up is encoded by the reference, from the cut before it to the cut after it.

    Args:
        source: from ``gigatoken_source``.
        load_reference: loads the reference tokenizer, when it is first needed.

    Raises:
        GigatokenUnsupported: gigatoken does not take this tokenizer.
    """

    def __init__(self, source: GigatokenSource, load_reference: Callable[[], Tokenizer]) -> None:
        self.name, self.vocab_size = source.name, source.vocab_size
        self.eod, self.bos = source.eod, source.bos
        self.source = source
        self._missing = re.compile(source.missing) if source.missing else None
        self._load_reference = load_reference
        self._load()

    @cached_property
    def reference(self) -> Tokenizer:
        """The library that the ids are those of."""
        return self._load_reference()

    @cached_property
    def splitter(self) -> TextSplitter | None:
        """Where long texts may be cut."""
        return find_text_splitter(self.reference)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: uint32 arrays of shape (tokens,), no bos or eod added."""
        self._characters += sum(map(len, texts))
        if self._characters > _CHECK_CHARACTERS:
            self._bound_cache()
        encode = self._backend.encode
        rows = [encode(text) for text in texts]
        if self._missing is not None:
            for i, row in enumerate(rows):
                if row.size and row.max() >= self.vocab_size:
                    rows[i] = self._repaired(texts[i])
        return rows

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, by the reference."""
        return self.reference.decode(ids)

    def _load(self) -> None:
        import gigatoken

        self._backend = None  # lets go of the old cache first
        try:
            self._backend = gigatoken.Tokenizer.from_json(self.source.json).backend
        except Exception as exc:  # a Rust panic or error of any type: this tokenizer is not taken
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise GigatokenUnsupported(
                f"gigatoken does not take this tokenizer ({reason})"
            ) from exc
        self._characters = 0
        self._resident = _resident_bytes()

    def _bound_cache(self) -> None:
        self._characters = 0
        if _resident_bytes() - self._resident > CACHE_BYTES:
            self._load()

    def _repaired(self, text: str) -> np.ndarray:
        """Encode by the reference what lies between the cuts around each missing byte."""
        if self.splitter is None:
            return self.reference.encode([text])[0].astype(np.uint32)
        rows, done = [], 0
        for start, end in _around(text, self._missing, self.splitter):
            rows += [
                self._backend.encode(text[done:start]),
                *self.reference.encode([text[start:end]]),
            ]
            done = end
        return np.concatenate([*rows, self._backend.encode(text[done:])]).astype(np.uint32)


def _around(text: str, missing: re.Pattern[str], splitter: TextSplitter) -> list[tuple[int, int]]:
    """Return stretches from cut to cut that hold all characters matched by ``missing``."""
    stretches: list[tuple[int, int]] = []
    for found in missing.finditer(text):
        at = found.start()
        if stretches and at < stretches[-1][1]:
            continue
        floor = stretches[-1][1] if stretches else 0
        start = splitter.last(text, max(at - _REPAIR_CHARACTERS, floor), at)
        end = splitter.first(text, at + 1)
        start = floor if start is None else start
        if stretches and start == floor:
            start = stretches.pop()[0]
        stretches.append((start, len(text) if end is None else end))
    return stretches


def _sentencepiece_source(reference: SentencePieceTokenizer) -> str:
    try:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        source = json.loads(sentencepiece_to_tokenizer_json(reference.serialized))
    except (ImportError, ValueError) as exc:
        raise GigatokenUnsupported(f"gigatoken does not take this model ({exc})") from exc
    # Control pieces written out in the text are text to sentencepiece.
    source["added_tokens"] = [token for token in source["added_tokens"] if not token["special"]]
    return json.dumps(source)


def _with_every_byte(description: dict[str, Any], vocab_size: int) -> tuple[str, str]:
    model = description["model"]
    if model.get("type") != "BPE":
        raise GigatokenUnsupported(f"gigatoken takes BPE, this is {model.get('type')}")
    if "ByteLevel" not in json.dumps(description.get("pre_tokenizer")):
        return json.dumps(description), ""
    vocab = dict(model["vocab"])
    absent = [byte for byte, letter in _byte_letters().items() if letter not in vocab]
    for i, byte in enumerate(absent):
        vocab[_byte_letters()[byte]] = vocab_size + i
    source = {**description, "model": {**model, "vocab": vocab}}
    return json.dumps(source), _characters_of(absent)


def _characters_of(absent: list[int]) -> str:
    """Return a regular expression of the characters whose UTF-8 has one of the bytes."""
    ranges = filter(None, map(_led_by, absent))
    inside = "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)
    return f"[{inside}]" if inside else ""


def _led_by(byte: int) -> tuple[int, int] | None:
    """Return the first and last character whose UTF-8 begins with ``byte``, None for no character.

    Raises:
        GigatokenUnsupported: the byte is in the middle of characters of all kinds.
    """
    if byte < 0x80:
        return byte, byte
    if byte < 0xC0:
        raise GigatokenUnsupported(
            f"its vocabulary lacks byte {byte:#x}, which many characters hold"
        )
    if byte < 0xE0:
        return None if byte < 0xC2 else ((byte & 0x1F) << 6, (byte & 0x1F) << 6 | 0x3F)
    if byte < 0xF0:
        return max((byte & 0xF) << 12, 0x800), (byte & 0xF) << 12 | 0xFFF
    if byte < 0xF5:
        return max((byte & 7) << 18, 0x10000), min((byte & 7) << 18 | 0x3FFFF, 0x10FFFF)
    return None


def _byte_letters() -> dict[int, str]:
    """Return the letter that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the other bytes for U+0100 and on (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(0x100)}


def _resident_bytes() -> int:
    """Return how much memory this process holds; where that is not known, more at each call."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
