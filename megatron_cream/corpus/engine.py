# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer does the work: the fast one where it was seen to be exact, else the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_cream.corpus.gigatoken import FastTokenizer, NotFast, fast_source
from megatron_cream.corpus.inputs import STDIN
from megatron_cream.corpus.jsonl import BadRecord, Fields
from megatron_cream.corpus.readers import Piece, read_piece
from megatron_cream.corpus.tokenizers import ByteLevelTokenizer, Tokenizer
from megatron_cream.corpus.verify import EXCERPT_CHARACTERS, first_difference, hard_texts
from megatron_cream.errors import UserError

ENGINES = ("auto", "fast", "reference")
_LIBRARIES = {
    "HuggingFaceTokenizer": "tokenizers",
    "SentencePieceTokenizer": "sentencepiece",
    "ByteLevelTokenizer": "numpy",
}


def choose_engine(
    wanted: str, reference: Tokenizer, texts: Iterable[str]
) -> tuple[FastTokenizer | None, str]:
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
        fast = FastTokenizer(fast_source(reference), lambda: reference)
        difference = _difference(fast, reference, texts)
    except NotFast as exc:
        fast, difference = None, str(exc)
    if isinstance(difference, int):
        return fast, f"tokenizing with gigatoken, compared with {library} on {difference} texts"
    if wanted == "fast":
        raise UserError(f"--engine fast: {difference}; needs --engine reference or auto")
    return None, f"tokenizing with {library}: {difference}"


def first_texts(pieces: Iterable[Piece], fields: Fields, count: int) -> Iterator[str]:
    """Yield the beginnings of the first ``count`` documents; nothing of standard input."""
    for piece in pieces:
        if count <= 0 or piece.path == str(STDIN):
            return
        for record in read_piece(piece, fields):
            try:
                text = record.text if isinstance(record.text, str) else next(record.text, "")
            except (TypeError, BadRecord):
                continue  # it has no text, which is found again, and told, when it is its turn
            yield text[:EXCERPT_CHARACTERS]
            count -= 1
            if count <= 0:
                return


def _difference(fast: FastTokenizer, reference: Tokenizer, texts: Iterable[str]) -> int | str:
    """Return how many texts have the same ids, or the first difference."""
    every = [*hard_texts(reference), *texts]
    found = first_difference(fast, every)
    return len(every) if found is None else f"gigatoken gives other ids, {found[1]}"
