# SPDX-License-Identifier: Apache-2.0
"""Chooses the tokenizer that does the work: gigatoken where it is exact, else the reference.

Whether it is exact is checked on texts that are known to be hard, and on the user's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_cream.corpus.gigatoken import (
    GigatokenTokenizer,
    GigatokenUnsupported,
    gigatoken_source,
)
from megatron_cream.corpus.jsonl import BadRecord, Fields
from megatron_cream.corpus.readers import STDIN, InputSpan, read_span
from megatron_cream.corpus.tokenizers import (
    ByteLevelTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_cream.errors import UserError

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


def first_difference(fast: GigatokenTokenizer, texts: Iterable[str]) -> tuple[int, str] | None:
    """Return which of ``texts`` has other ids than the reference gives, and how; None if none."""
    for i, text in enumerate(texts):
        (ours,), (theirs,) = fast.encode([text]), fast.reference.encode([text])
        if not np.array_equal(ours, theirs):
            return i, _how(fast, ours, theirs)
    return None


class CheckedTokenizer:
    """The fast tokenizer, refusing to go on where the reference gives other ids."""

    def __init__(self, fast: GigatokenTokenizer) -> None:
        self.fast = fast
        self.name, self.vocab_size = fast.name, fast.vocab_size
        self.eod, self.bos = fast.eod, fast.bos

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text.

        Raises:
            UserError: they are not those of the reference.
        """
        rows = self.fast.encode(texts)
        for ours, theirs in zip(rows, self.fast.reference.encode(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise UserError(
                    f"--engine fast: gigatoken differs from the reference tokenizer: "
                    f"{_how(self.fast, ours, theirs)}; needs --engine reference"
                )
        return rows

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids."""
        return self.fast.decode(ids)


def _how(fast: GigatokenTokenizer, ours: np.ndarray, theirs: np.ndarray) -> str:
    shared = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:shared] != theirs[:shared])
    at = int(differ[0]) if len(differ) else shared
    near = fast.decode(theirs[max(at - 4, 0) : at + 4])
    return (
        f"token {at} is {ours[at : at + 3].tolist()} instead of {theirs[at : at + 3].tolist()}, "
        f"near {near!r}"
    )


ENGINES = ("auto", "fast", "reference")
_LIBRARIES = {
    "HuggingFaceTokenizer": "tokenizers",
    "SentencePieceTokenizer": "sentencepiece",
    "ByteLevelTokenizer": "numpy",
}


def choose_engine(
    wanted: str, reference: Tokenizer, texts: Iterable[str]
) -> tuple[GigatokenTokenizer | None, str]:
    """Return the fast tokenizer, None for the reference, and a line that says why.

    Args:
        wanted: one of ENGINES.
        reference: the tokenizer that decides.
        texts: documents to compare both on, beside texts that are known to be hard.

    Raises:
        UserError: ``fast`` is wanted, and not installed, not possible or not exact.
    """
    library = _LIBRARIES[reference.name]
    if wanted == "reference" or isinstance(reference, ByteLevelTokenizer):
        if wanted == "fast":
            raise UserError(f"--engine fast: {reference.name} has none, needs --engine auto")
        return None, f"tokenizing with {library}"
    try:
        fast = GigatokenTokenizer(gigatoken_source(reference), lambda: reference)
        difference = _difference(fast, reference, texts)
    except GigatokenUnsupported as exc:
        fast, difference = None, str(exc)
    if isinstance(difference, int):
        return fast, f"tokenizing with gigatoken, compared with {library} on {difference} texts"
    if wanted == "fast":
        raise UserError(f"--engine fast: {difference}; needs --engine reference or auto")
    return None, f"tokenizing with {library}: {difference}"


def sample_texts(pieces: Iterable[InputSpan], fields: Fields, count: int) -> Iterator[str]:
    """Yield the beginnings of the first ``count`` documents; nothing of standard input."""
    for piece in pieces:
        if count <= 0 or piece.path == str(STDIN):
            return
        for record in read_span(piece, fields):
            try:
                text = record.text if isinstance(record.text, str) else next(record.text, "")
            except (TypeError, BadRecord):
                continue  # it has no text, which is found again, and told, when it is its turn
            yield text[:EXCERPT_CHARACTERS]
            count -= 1
            if count <= 0:
                return


def _difference(fast: GigatokenTokenizer, reference: Tokenizer, texts: Iterable[str]) -> int | str:
    """Return how many texts have the same ids, or the first difference."""
    every = [*hard_texts(reference), *texts]
    found = first_difference(fast, every)
    return len(every) if found is None else f"gigatoken gives other ids, {found[1]}"
