# SPDX-License-Identifier: Apache-2.0
"""Gives the ids of the reference libraries, faster, and of long texts in bounded memory.

gigatoken is some fifty times as fast. It is optional and may refuse a tokenizer. That its ids are
the same is checked, on texts known to be hard and on the user's own.

A long text is cut so that the ids of its stretches in a row are those of the whole. Two kinds of
tokenizers have such places. One that splits text into words first (a pre-tokenizer) never merges
across words: the text is cut between two words, each cut tried on the real pre-tokenizer. One that
marks word starts with U+2581 and knows a line end only as a byte never merges across a line end:
the text is cut before it, and the mark put before every text is taken off. Others get texts whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cream.corpus.tokenizers import (
    ByteLevelTokenizer,
    HuggingFaceTokenizer,
    LocatedTokens,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_cream.errors import UserError

ENGINES = ("auto", "fast", "reference")
_LIBRARIES = {
    "HuggingFaceTokenizer": "tokenizers",
    "SentencePieceTokenizer": "sentencepiece",
    "ByteLevelTokenizer": "numpy",
}

CACHE_BYTES = 256 << 20
"""A tokenizer whose cache of words has made the process grow by this much is loaded anew."""

_CHECK_CHARACTERS = 8 << 20


def choose_engine(
    wanted: str, reference: Tokenizer, texts: Iterable[str], verify_all: bool = False
) -> tuple[Tokenizer, str]:
    """Return the fast tokenizer or the reference, and a line that says why.

    Args:
        wanted: one of ENGINES.
        reference: the tokenizer that decides.
        texts: documents to compare both on, beside texts that are known to be hard.
        verify_all: whether the fast one is to compare every text.

    Raises:
        UserError: ``fast`` is wanted, and not installed, not possible or not exact.
    """
    library = _LIBRARIES[reference.name]
    if wanted == "reference" or isinstance(reference, ByteLevelTokenizer):
        if wanted == "fast":
            raise UserError(f"--engine fast: {reference.name} has none, needs --engine auto")
        return reference, f"tokenizing with {library}"
    try:
        fast = GigatokenTokenizer(reference)
        every = [*hard_texts(reference), *texts]
        difference = fast.first_difference(every)
        if difference is None:
            fast.verify_all = verify_all
            return fast, f"tokenizing with gigatoken, compared with {library} on {len(every)} texts"
        why = f"gigatoken gives other ids, {difference}"
    except GigatokenUnsupported as exc:
        why = str(exc)
    if wanted == "fast":
        raise UserError(f"--engine fast: {why}; needs --engine reference or auto")
    return reference, f"tokenizing with {library}: {why}"


EXCERPT_CHARACTERS = 1 << 13
"""Long texts are compared by an excerpt: the reference takes a second for a megabyte."""

_HARD = (
    "",
    " ",
    "\n",
    " leading and trailing ",
    "  two   three    four\t\ttabs \n\n\n lines\r\n\r\n",
    "I'll DON'T we've they'RE x's",
    "0 12 345 6789 12345678901234567890 3.14 1,000,000",
    "caf\u00e9 cafe\u0301 \ufb01 \u00bd \uff21 \u212b \u1e9b\u0323",
    "\u4e2d\u6587\u6587\u672c\u3002\u65e5\u672c\u8a9e\u306e\u6587",
    "\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f388 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028\u0085 odd spaces",
    "".join(map(chr, range(1, 32))) + "\x7f controls",
    "\u2581word \u2581\u2581 mark",
    "def f(x):\n    return {'a': [x**2, -1e-5]}  # done\n\n\n",
    "<s> </s> <unk> <0x0A> <|endoftext|> [INST] <pad>",
    "a" * 300 + " " * 300 + "!" * 300,
    "\U000e0001\U0010ffff\ufffd\ud7ff\ue000",
)


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Return short texts on which tokenizers differ, with each special token in several places."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokens = [token["content"] for token in tokenizer.description.get("added_tokens") or []]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokens = [tokenizer.decode([i]) or piece for i, piece in enumerate(tokenizer.pieces[:64])]
    else:
        tokens = []
    around = [f"{t}a {t} b{t}{t}\n{t[:-1]} {t}" for t in tokens]
    return [*_HARD, *around, " ".join(_HARD)]


def excerpt(text: str) -> str:
    """Return a text, or the middle of a long one."""
    start = max((len(text) - EXCERPT_CHARACTERS) // 2, 0)
    return text[start : start + EXCERPT_CHARACTERS]


class GigatokenUnsupported(Exception):
    """Why gigatoken cannot be used for a tokenizer."""


class GigatokenTokenizer:
    """gigatoken behind the ``Tokenizer`` protocol.

    Some vocabularies lack a byte (most lack those that UTF-8 never has), which gigatoken refuses
    and the reference leaves out. Such bytes get ids past the vocabulary here; a text in which one
    comes up is encoded by the reference.

    Args:
        reference: the library that the ids are those of.
        verify_all: whether ``encode`` compares every text with the reference.

    Raises:
        GigatokenUnsupported: gigatoken is not installed, or does not take this tokenizer.
    """

    def __init__(self, reference: Tokenizer, verify_all: bool = False) -> None:
        self.name, self.vocab_size = reference.name, reference.vocab_size
        self.eod, self.bos = reference.eod, reference.bos
        self.reference, self.verify_all = reference, verify_all
        self._source, self._lacks_bytes = _tokenizer_json(reference)
        self._characters = self._resident = 0
        self._load()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: uint32 arrays of shape (tokens,), no bos or eod added.

        Raises:
            UserError: with ``verify_all``, they are not those of the reference.
        """
        self._characters += sum(map(len, texts))
        if self._characters > _CHECK_CHARACTERS:
            self._characters = 0
            if _resident_bytes() - self._resident > CACHE_BYTES:
                self._load()
        rows = [self._backend.encode(text) for text in texts]
        for i, row in enumerate(rows if self._lacks_bytes else ()):
            if row.max(initial=0) >= self.vocab_size:
                rows[i] = self.reference.encode([texts[i]])[0].astype(np.uint32)
        if self.verify_all:
            self.verify(texts, rows)
        return rows

    def verify(self, texts: list[str], rows: list[np.ndarray]) -> None:
        """Compare ids with those of the reference.

        Raises:
            UserError: they differ.
        """
        for ours, theirs in zip(rows, self.reference.encode(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise UserError(
                    f"--engine fast: gigatoken differs from the reference tokenizer: "
                    f"{self._describe(ours, theirs)}; needs --engine reference"
                )

    def first_difference(self, texts: Iterable[str]) -> str | None:
        """Return how the first of ``texts`` whose ids are not the reference's differs, or None."""
        for text in texts:
            (ours,), (theirs,) = self.encode([text]), self.reference.encode([text])
            if not np.array_equal(ours, theirs):
                return self._describe(ours, theirs)
        return None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, by the reference."""
        return self.reference.decode(ids)

    def locate(self, text: str) -> LocatedTokens:
        """The tokens of a text and the characters of each, by the reference."""
        return self.reference.locate(text)

    def _describe(self, ours: np.ndarray, theirs: np.ndarray) -> str:
        shared = min(len(ours), len(theirs))
        differ = np.flatnonzero(ours[:shared] != theirs[:shared])
        at = int(differ[0]) if len(differ) else shared
        near = self.decode(theirs[max(at - 4, 0) : at + 4])
        found, wanted = (ids[at : at + 3].tolist() for ids in (ours, theirs))
        return f"token {at} is {found} instead of {wanted}, near {near!r}"

    def _load(self) -> None:
        import gigatoken

        self._backend: Any = None  # lets go of the old cache first
        try:
            self._backend = gigatoken.Tokenizer.from_json(self._source).backend
        except Exception as exc:  # a Rust panic or error of any type: this tokenizer is not taken
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise GigatokenUnsupported(
                f"gigatoken does not take this tokenizer ({reason})"
            ) from exc
        self._characters = 0
        self._resident = _resident_bytes()


def _tokenizer_json(reference: Tokenizer) -> tuple[str, bool]:
    """Return a tokenizer.json for gigatoken, and whether bytes were added to its vocabulary.

    Raises:
        GigatokenUnsupported: gigatoken is not installed, or does not take this kind.
    """
    try:
        import gigatoken  # noqa: F401
    except ImportError as exc:
        raise GigatokenUnsupported("gigatoken is not installed (`pip install gigatoken`)") from exc
    if isinstance(reference, SentencePieceTokenizer):
        return _sentencepiece_json(reference), False
    if not isinstance(reference, HuggingFaceTokenizer):
        raise GigatokenUnsupported(f"{reference.name} needs no library")
    description = reference.description
    model = description["model"]
    if model.get("type") != "BPE":
        raise GigatokenUnsupported(f"gigatoken takes BPE, this is {model.get('type')}")
    if "ByteLevel" not in json.dumps(description.get("pre_tokenizer")):
        return json.dumps(description), False
    absent = [letter for letter in _byte_letters().values() if letter not in model["vocab"]]
    past = {letter: reference.vocab_size + i for i, letter in enumerate(absent)}
    completed = {**description, "model": {**model, "vocab": {**model["vocab"], **past}}}
    return json.dumps(completed), bool(absent)


def _sentencepiece_json(reference: SentencePieceTokenizer) -> str:
    try:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        source = json.loads(sentencepiece_to_tokenizer_json(reference.serialized))
    except (ImportError, ValueError) as exc:
        raise GigatokenUnsupported(f"gigatoken does not take this model ({exc})") from exc
    # Control pieces written out in the text are text to sentencepiece.
    source["added_tokens"] = [token for token in source["added_tokens"] if not token["special"]]
    return json.dumps(source)


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
    words = tokenizer.words
    return TextSplitter(_BETWEEN_WORDS, 0, lambda a, b: words(a + b) == words(a) + words(b))


def encode_pieces(
    tokenizer: Tokenizer, splitter: TextSplitter | None, pieces: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yield the ids of a text that comes in pieces, cut anywhere, ``[tokens]`` at a time."""
    first = True
    for stretch in _cut_anew(splitter, pieces):
        (ids,) = tokenizer.encode([stretch])
        yield ids if first or splitter is None else ids[splitter.dropped :]
        first = False


def encode_texts(
    tokenizer: Tokenizer, texts: list[str], splitter: Callable[[], TextSplitter | None]
) -> list[np.ndarray]:
    """Return the ids of each text, ``[tokens]``; in stretches where one is long."""
    if max(map(len, texts), default=0) <= CUT_CHARACTERS:
        return tokenizer.encode(texts)
    rows = []
    for text in texts:
        starts = range(0, len(text), CUT_CHARACTERS)
        pieces = (text[start : start + CUT_CHARACTERS] for start in starts)
        rows.append(np.concatenate(list(encode_pieces(tokenizer, splitter(), pieces))))
    return rows


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
