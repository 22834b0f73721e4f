# SPDX-License-Identifier: Apache-2.0
"""Finds how many pieces of haystack fit a length, as RULER does, and makes cases of that size.

The size is searched for once, by drawing cases; each draw moves the random state on. Then every
case is drawn at that size, and again with ``step`` pieces fewer while it is too long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.templates import TaskWording, around

_TRIES = 100  # RULER tries for ever


@dataclass(frozen=True)
class RulerCase:
    """One question about one haystack.

    Attributes:
        prompt: what the model reads, without the beginning of the answer.
        prefix: how the answer begins; the model reads it after ``prompt`` and goes on.
        answers: strings to be found in what the model writes.
        length: tokens of ``prompt`` and ``prefix``, and those that the model may write.
    """

    prompt: str
    prefix: str
    answers: tuple[str, ...]
    length: int


@dataclass(frozen=True)
class RulerText:
    """A case as text: prompt with the answer's beginning, and the answers."""

    text: str
    answers: list[str]

    def split(self, prefix: str, length: int) -> RulerCase:
        """Return a case; the answer's beginning is found by its first ten characters."""
        at = self.text.rfind(prefix[:10])
        return RulerCase(self.text[:at], self.text[at:], tuple(self.answers), length)


@dataclass
class CaseSampler:
    """Draws the cases of one task at one length.

    Attributes:
        length: tokens of a case, those to generate included.
        count: text to its number of tokens, special ones not added.
        model_template: one of ``templates.MODEL_TEMPLATES``, or another with ``{task_template}``.
        seed: RULER's is 42.
        random, numpy: RULER's two random states.
    """

    length: int
    count: Callable[[str], int]
    model_template: str = "{task_template}"
    seed: int = 42
    random: random.Random = field(init=False)
    numpy: np.random.RandomState = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.numpy = np.random.RandomState(self.seed)

    def shuffle(self, things: list) -> None:
        """Shuffle in place, always in the same way for the same number of things."""
        random.Random(self.seed).shuffle(things)

    def template(self, wording: TaskWording) -> str:
        """Return what a model reads, to be filled in."""
        return around(wording, self.model_template)

    def find_size(
        self,
        draw: Callable[[int], RulerText],
        step: int,
        more: int,
        estimate: int | None = None,
    ) -> int:
        """Return the largest number of pieces whose case fits, by bisection; at least ``step``.

        Args:
            more: tokens of a case beside its text.
            estimate: where the bisection begins from above; by default three times as many pieces
                as would fit if all were like those of a case of ``step`` pieces.
        """
        if estimate is None:
            estimate = int((self.length / (self.count(draw(step).text) / step)) * 3)
        low, high, best = step, max(estimate, 2 * step), step
        while low <= high:
            middle = (low + high) // 2
            if self.count(draw(middle).text) + more <= self.length:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def draw_text(
        self,
        task: str,
        draw: Callable[[int], RulerText | None],
        size: int,
        step: int,
        new_tokens: int,
    ) -> tuple[RulerText, int]:
        """Return a case that fits, and its length.

        Args:
            draw: number of pieces to a case; None where there is none of so few.

        Raises:
            UserError: cases of the fewest pieces do not fit.
        """
        length = 0
        for _ in range(_TRIES):
            text = draw(size)
            if text is not None:
                length = self.count(text.text) + new_tokens
                if length <= self.length:
                    return text, length
            if size > step:
                size -= step
        raise UserError(
            f"--lengths has {self.length}: it is too short for {task}, of which a case needs about "
            f"{length} tokens with this tokenizer and prompt, {new_tokens} to generate included"
        )

    def draw_case(
        self,
        task: str,
        draw: Callable[[int], RulerText | None],
        size: int,
        step: int,
        wording: TaskWording,
    ) -> RulerCase:
        """Return a case that fits; see ``draw_text``."""
        text, length = self.draw_text(task, draw, size, step, wording.new_tokens)
        return text.split(wording.prefix, length)
