# SPDX-License-Identifier: Apache-2.0
"""Builds cases of an exact token length out of separately encoded pieces of text.

A haystack is a context and the questions asked about it. Pieces of text are encoded one by one and
joined as tokens, so that neither a neighbour nor the padding changes a needle's tokens. What is
left of the length is filled with prose in front of the task, cut at a token, and with blank lines
in front of shorter questions.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.prompts import Prompt

ROUND = 8
"""Tails are a multiple of so many tokens, so that cases of other seeds have the same shape."""


@dataclass(frozen=True)
class Question:
    """One question about a haystack, as text.

    Attributes:
        text: the question.
        cue: how the answer begins; given to the model, not scored.
        items: the answer in parts, each with the space or the comma before it.
        where: where in the context the answer stands, from 0 (its beginning) to 1.
    """

    text: str
    cue: str
    items: tuple[str, ...]
    where: float


@dataclass(frozen=True)
class HaystackText:
    """A haystack as text: an introduction, the pieces of its body, and questions."""

    intro: str
    body: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class CaseTail:
    """The end of a case in tokens: blank lines, question, cue, answer.

    Attributes:
        tokens: int64 ``[t]``.
        items: tokens of each part of the answer; together the last ones of ``tokens``.
        where: as in ``Question``.
    """

    tokens: np.ndarray
    items: tuple[int, ...]
    where: float

    @property
    def answer(self) -> np.ndarray:
        """Tokens of the answer."""
        return self.tokens[len(self.tokens) - sum(self.items) :]


@dataclass(frozen=True)
class HaystackCases:
    """Cases that share a context.

    Attributes:
        context: int64 ``[c]``.
        tails: of the same number of tokens each.
        length: tokens of a case, ``c + t``.
        seed: what it was drawn from.
        number: which one of those that task, length and seed make.
    """

    context: np.ndarray
    tails: list[CaseTail]
    length: int
    seed: int
    number: int = 0


def rng(*parts: str | int) -> np.random.Generator:
    """Return a generator that names and numbers decide, the same on every machine."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return np.random.default_rng(numbers)


_VOCABULARY: dict[str, list[str]] = json.loads(
    (resources.files(__package__) / "vocabulary.json").read_text("utf-8")
)
ADJECTIVES, NOUNS = _VOCABULARY["adjectives"], _VOCABULARY["nouns"]


def sentence(draw: np.random.Generator) -> str:
    """Return one sentence of prose, with the space before it."""
    adjective, person, doing, place, time = (
        _VOCABULARY[kind][draw.integers(len(_VOCABULARY[kind]))]
        for kind in ("adjectives", "people", "doings", "places", "times")
    )
    return f" {time} the {adjective} {person} {doing} {place}."


@lru_cache(maxsize=32)
def sentences(seed: int, count: int) -> tuple[str, ...]:
    """Return ``count`` sentences; a longer list of the same seed begins with a shorter one."""
    draw = np.random.default_rng([seed, 17])
    return tuple(sentence(draw) for _ in range(count))


def prose(tokens: int, encode: Callable[[str], np.ndarray]) -> str:
    """Return prose of at least ``tokens`` tokens, always the same."""
    count = 1
    while len(encode(text := "".join(sentences(0, count)))) < tokens:
        count *= 2
    return text


MOST_NAMES = len(ADJECTIVES) * len(NOUNS)


def names(draw: np.random.Generator, count: int) -> list[str]:
    """Return different names such as ``amber-lantern``.

    Raises:
        UserError: there are not so many.
    """
    if count > MOST_NAMES:
        raise UserError(
            f"{count} different names are needed: there are {MOST_NAMES}; take a shorter case"
        )
    chosen = draw.permutation(MOST_NAMES)[:count]
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in chosen]


def space_out(text: HaystackText, seed: int, count: int) -> HaystackText:
    """Return a text with ``count`` sentences of prose behind the pieces of its body, evenly."""
    said, pieces = sentences(seed, count), len(text.body)
    borders = [count * i // pieces for i in range(pieces + 1)]
    body = [
        piece + "".join(said[a:b]).lstrip() + "\n" * (b > a)
        for piece, a, b in zip(text.body, borders, borders[1:], strict=False)
    ]
    return HaystackText(text.intro, body, text.questions)


def even_places(count: int) -> list[float]:
    """Return ``count`` places from 0 to 1, both included; the middle for one."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


@dataclass
class HaystackBuilder:
    """Builds haystacks out of texts.

    Attributes:
        prompt: tokenizer and the words around a task.
        shots: worked examples in front of the haystack.
    """

    prompt: Prompt
    shots: list[HaystackText] = field(default_factory=list)

    def fit(
        self,
        name: str,
        draw: Callable[[int], HaystackText],
        length: int,
        seed: int,
        number: int = 0,
        least: int = 1,
        most: int = sys.maxsize,
    ) -> HaystackCases:
        """Return the haystack of ``length`` tokens with as large a body as fits.

        Args:
            name: the task's, for the message.
            draw: number of pieces of the body to a text; a pure function.
            seed, number: which haystack it is.
            least: smallest number of pieces that makes a case.
            most: how many different pieces there are.

        Raises:
            UserError: as ``most_pieces``.
        """
        fits = self.most_pieces(name, draw, length, least, most)
        return self._build(draw(fits), length, seed, number)

    def most_pieces(
        self,
        name: str,
        draw: Callable[[int], HaystackText],
        length: int,
        least: int = 1,
        most: int = sys.maxsize,
    ) -> int:
        """Return how many pieces of a body fit in ``length`` tokens; arguments as of ``fit``.

        Raises:
            UserError: not even ``least`` pieces fit, or more than ``most`` would.
        """
        smallest = self._size(draw(least))
        if smallest > length:
            raise UserError(
                f"--lengths has {length}: {name} needs at least {smallest} tokens with this "
                "tokenizer, prompt and number of cases"
            )
        fits, over = least, least + 1
        while over <= most and self._size(draw(over)) <= length:
            fits, over = over, min(2 * over, most + 1)
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if self._size(draw(middle)) <= length else (fits, middle)
        if fits >= most:
            raise UserError(
                f"--lengths has {length}: {name} has no more than {most} pieces, which do not "
                "fill it; take a shorter one"
            )
        return fits

    def build_as_is(self, text: HaystackText) -> tuple[np.ndarray, CaseTail]:
        """Return context and tail of a text with one question, without any padding."""
        (question,) = text.questions
        return self._context(text), self._tail(question)

    def _build(self, text: HaystackText, length: int, seed: int, number: int) -> HaystackCases:
        longest = max(len(self._tail_tokens(question)) for question in text.questions)
        room = length - len(self._context(text))
        size = min(room, -(-longest // ROUND) * ROUND)
        context = self._context(text, room - size)
        tails = [self._tail(question, size) for question in text.questions]
        return HaystackCases(context, tails, length, seed, number)

    def _size(self, text: HaystackText) -> int:
        longest = max(len(self._tail_tokens(question)) for question in text.questions)
        return len(self._context(text)) + longest

    def _context(self, text: HaystackText, padding: int = 0) -> np.ndarray:
        encode = self.prompt.encode
        pieces = [*self.prompt.opening(), *self._shot_pieces()]
        if padding:  # the last token is a line break
            filler = encode(prose(padding, encode))[: padding - 1]
            pieces.append(np.append(filler, encode("\n")[:1]))
        pieces += self.prompt.encode_all([text.intro, *text.body])
        return np.concatenate(pieces)

    def _shot_pieces(self) -> Iterable[np.ndarray]:
        for shot in self.shots:
            question = shot.questions[0]
            for text in (shot.intro, *shot.body, question.text, question.cue, *question.items):
                yield self.prompt.encode(text)
            yield self.prompt.encode("\n\n")

    def _tail_tokens(self, question: Question) -> np.ndarray:
        encode = self.prompt.encode
        turn = self.prompt.turn()
        # After a turn the cue begins a text; its space belongs to what came before it.
        cue = question.cue.lstrip() if turn else question.cue
        pieces = [encode(question.text), *turn, encode(cue), *map(encode, question.items)]
        return np.concatenate(pieces)

    def _tail(self, question: Question, size: int = 0) -> CaseTail:
        """Return a tail of at least ``size`` tokens, with blank lines in front.

        A space that is a token of its own before the first part of the answer belongs to the cue:
        a model that would rather write "a" there has not missed the answer.
        """
        tokens = self._tail_tokens(question)
        padding = np.resize(self.prompt.encode("\n"), max(0, size - len(tokens)))
        sizes = [len(self.prompt.encode(item)) for item in question.items]
        for token in self.prompt.encode(question.items[0]):
            if self.prompt.tokenizer.decode([token]).strip():
                break
            sizes[0] -= 1
        return CaseTail(np.concatenate([padding, tokens]), tuple(sizes), question.where)
