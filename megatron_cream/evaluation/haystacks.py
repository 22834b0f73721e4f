# SPDX-License-Identifier: Apache-2.0
"""Cases of an exact token length, put together out of separately encoded pieces.

A haystack is a context and the questions asked about it. Pieces of text are encoded one by one and
joined as tokens, so that neither a neighbour nor the padding changes a needle's tokens. What is
left of the length is filled with prose in front of the task, cut at a token, and with blank lines
in front of shorter questions.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.filler import prose
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
class Draft:
    """A haystack as text: an introduction, the pieces of its body, and questions."""

    intro: str
    body: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class Tail:
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
class Haystack:
    """Cases that share a context.

    Attributes:
        context: int64 ``[c]``.
        tails: of the same number of tokens each.
        length: tokens of a case, ``c + t``.
        seed: what it was drawn from.
        number: which one of those that task, length and seed make.
    """

    context: np.ndarray
    tails: list[Tail]
    length: int
    seed: int
    number: int = 0


def rng(*parts: str | int) -> np.random.Generator:
    """Return a generator that names and numbers decide, the same on every machine."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return np.random.default_rng(numbers)


@dataclass
class Kit:
    """Puts haystacks together.

    Attributes:
        prompt: tokenizer and the words around a task.
        shots: worked examples in front of the haystack.
    """

    prompt: Prompt
    shots: list[Draft] = field(default_factory=list)

    def fit(
        self,
        name: str,
        draw: Callable[[int], Draft],
        length: int,
        seed: int,
        least: int = 1,
        most: int = sys.maxsize,
    ) -> Haystack:
        """Return the haystack of ``length`` tokens with as large a body as fits.

        Args:
            name: the task's, for the message.
            draw: number of body pieces to draft; a pure function.
            least: smallest number of pieces that makes a case.
            most: how many different pieces there are.

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
        return self._build(draw(fits), length, seed)

    def as_is(self, draft: Draft) -> tuple[np.ndarray, Tail]:
        """Return context and tail of a draft of one question, without any padding."""
        (question,) = draft.questions
        tail = Tail(self._tails(draft)[0], self._item_sizes(question), question.where)
        return self._context(draft), tail

    def _size(self, draft: Draft) -> int:
        return len(self._context(draft)) + max(map(len, self._tails(draft)))

    def _context(self, draft: Draft, padding: int = 0) -> np.ndarray:
        encode = self.prompt.encode
        pieces = [*self.prompt.opening(), *self._shot_pieces()]
        if padding:  # the last token is a line break
            text = encode(prose(padding, encode))[: padding - 1]
            pieces.append(np.append(text, self.prompt.encode("\n")[:1]))
        pieces += self.prompt.encode_all([draft.intro, *draft.body])
        return np.concatenate(pieces)

    def _shot_pieces(self) -> Iterable[np.ndarray]:
        for shot in self.shots:
            question = shot.questions[0]
            for text in (shot.intro, *shot.body, question.text, question.cue, *question.items):
                yield self.prompt.encode(text)
            yield self.prompt.encode("\n\n")

    def _tails(self, draft: Draft) -> list[np.ndarray]:
        return [np.concatenate(self._tail_pieces(question)) for question in draft.questions]

    def _tail_pieces(self, question: Question) -> list[np.ndarray]:
        encode = self.prompt.encode
        turn = self.prompt.turn()
        # After a turn the cue begins a text; its space belongs to what came before it.
        cue = question.cue.lstrip() if turn else question.cue
        return [encode(question.text), *turn, encode(cue), *map(encode, question.items)]

    def _item_sizes(self, question: Question) -> tuple[int, ...]:
        """Return the tokens of each part of the answer.

        A space that is a token of its own before the first part belongs to the cue: a model that
        would rather write "a" there has not missed the answer.
        """
        sizes = [len(self.prompt.encode(item)) for item in question.items]
        for token in self.prompt.encode(question.items[0]):
            if self.prompt.tokenizer.decode([token]).strip():
                break
            sizes[0] -= 1
        return tuple(sizes)

    def _build(self, draft: Draft, length: int, seed: int) -> Haystack:
        longest = max(map(len, self._tails(draft)))
        room = length - len(self._context(draft))
        size = min(room, -(-longest // ROUND) * ROUND)
        context = self._context(draft, room - size)
        blank = self.prompt.encode("\n")
        tails = []
        for question, tokens in zip(draft.questions, self._tails(draft), strict=True):
            padding = np.resize(blank, size - len(tokens))
            items = self._item_sizes(question)
            tails.append(Tail(np.concatenate([padding, tokens]), items, question.where))
        return Haystack(context, tails, length, seed)
