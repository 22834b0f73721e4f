# SPDX-License-Identifier: Apache-2.0
"""Retrieval documents of exactly so many tokens: filler, then one or several tasks.

Every document is a pure function of (seed, number). Its tasks are written as text and tokenized as
a whole, so that their tokens are those of any other text; filler in front is cut at a token.
"""

from __future__ import annotations

import numpy as np

from megatron_cream.corpus.retrieval.haystack import Haystack
from megatron_cream.corpus.retrieval.tasks import MOST_QUESTIONS, Task, draw_task
from megatron_cream.corpus.retrieval.words import Rng, prose
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.errors import UserError
from megatron_cream.positions import philox

SHORTEST = 256
"""Tokens of a document that any task fits in."""

_STREAM = 3  # keeps documents apart from positions and shuffling of the same seed
_LEAST = 200  # tokens of a task, where a document has several
_SIZES = (48, 64)  # from here on a task has all its questions, and grows by records alone
_ANCHOR = "\n"


class DocumentMaker:
    """Makes documents of ``length`` tokens.

    Args:
        tokenizer: encodes them.
        length: tokens of each, the end of document included.
        seed: what they are drawn from.
        haystack: text of the user's.
        eod: token at the end of each, None for none.
        questions: most questions of a task.

    Raises:
        UserError: ``length`` is below ``SHORTEST``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        haystack: Haystack | None = None,
        eod: int | None = None,
        questions: int = MOST_QUESTIONS,
    ) -> None:
        if length < SHORTEST:
            raise UserError(f"--length is {length}: it must be at least {SHORTEST} tokens")
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.haystack, self.eod, self.questions = haystack, eod, questions
        self._anchor = tokenizer.encode([_ANCHOR])[0]

    def make(self, number: int) -> np.ndarray:
        """Return the tokens int64 ``[length]`` of document ``number``."""
        rng = philox.generator(self.seed, number, _STREAM)
        room = self.length - (self.eod is not None)
        parts = [self._fitted(rng, budget)[1] for budget in _budgets(rng, room)]
        left = room - sum(map(len, parts))
        end = [] if self.eod is None else [np.array([self.eod])]
        return np.concatenate([self._filler(rng, left), *parts, *end]).astype(np.int64)

    def task_texts(self, number: int) -> list[str]:
        """Return the text of each task of a document, without the filler in front of them."""
        rng = philox.generator(self.seed, number, _STREAM)
        room = self.length - (self.eod is not None)
        return [self._fitted(rng, budget)[0] for budget in _budgets(rng, room)]

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of text that follows a line break and begins with no white space.

        SentencePiece begins a text, but not what follows a line break, with a space of its own.
        """
        tokens = self.tokenizer.encode([_ANCHOR + text])[0]
        size = len(self._anchor)
        if size and np.array_equal(tokens[:size], self._anchor):
            return tokens[size:]
        return self.tokenizer.encode([text])[0]  # the line break went into a token with the text

    def _fitted(self, rng: Rng, budget: int) -> tuple[str, np.ndarray]:
        """Return text and tokens, at most ``budget``, of a task drawn anew until one fits."""
        for _ in range(100):
            task = draw_task(rng, budget, self.haystack, self.questions)
            found = self._largest(task, budget)
            if found is not None:
                return found
        raise UserError(
            f"--length is {self.length}: no task fits in {budget} tokens of this tokenizer; it "
            "must be longer"
        )

    def _largest(self, task: Task, budget: int) -> tuple[str, np.ndarray] | None:
        """Return the task at nearly the largest size that fits, None where the smallest does not.

        The tokens of two small sizes say how many the others have, nearly.
        """
        small, more = (min(size, task.most) for size in (_SIZES if budget > 2048 else (4, 24)))
        a, b = (len(self.encode(task.text(size))) for size in (small, more))
        each = max((b - a) / max(1, more - small), 0.5)
        size = min(task.most, int(small + (0.97 * budget - a) / each))
        while size >= 1:
            text = task.text(size)
            tokens = self.encode(text)
            if len(tokens) <= budget:
                return text, tokens
            size = min(size - 1, int(size * 0.97 * budget / len(tokens)))
        return None

    def _filler(self, rng: Rng, count: int) -> np.ndarray:
        """Return the last ``count`` tokens of some text that ends in a line break."""
        characters, tokens = 5 * count + 64, np.zeros(0, dtype=np.int64)
        while len(tokens) < count:
            drawn = self.haystack.passage(rng, characters) if self.haystack else None
            text = prose(rng, characters) if drawn is None else drawn
            tokens = self.encode(text.strip() + "\n")
            characters *= 2
        return tokens[len(tokens) - count :]


def _budgets(rng: Rng, tokens: int) -> list[int]:
    """Share tokens among one task, mostly, or up to four."""
    most = min(4, tokens // _LEAST)
    count = min(most, int(rng.choice([1, 1, 1, 2, 2, 3, 4]))) if most > 1 else 1
    spare = tokens - count * _LEAST
    if count == 1:
        return [tokens]
    shares = rng.dirichlet(np.ones(count))
    return [_LEAST + int(spare * share) for share in shares.tolist()]
