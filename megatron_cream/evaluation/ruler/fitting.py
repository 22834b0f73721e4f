# SPDX-License-Identifier: Apache-2.0
"""A case, and how many pieces of haystack fit a length, as RULER finds it.

The size is searched for once, by drawing cases; each draw moves the random state on. Then every
case is drawn at that size, and again with ``step`` pieces fewer while it is too long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError

_TRIES = 100  # RULER tries for ever


@dataclass(frozen=True)
class Case:
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
class Draw:
    """A case as text: prompt with the answer's beginning, and the answers."""

    text: str
    answers: list[str]


@dataclass
class Job:
    """What the cases of one task at one length are made with.

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


def largest(
    job: Job, draw: Callable[[int], Draw], step: int, more: int, estimate: int | None = None
) -> int:
    """Return the largest number of pieces whose case fits, by bisection; at least ``step``.

    Args:
        more: tokens of a case beside its text.
        estimate: where the bisection begins from above; by default three times as many pieces as
            would fit if all were like those of a case of ``step`` pieces.
    """
    if estimate is None:
        estimate = int((job.length / (job.count(draw(step).text) / step)) * 3)
    low, high, best = step, max(estimate, 2 * step), step
    while low <= high:
        middle = (low + high) // 2
        if job.count(draw(middle).text) + more <= job.length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def drawn(
    job: Job, task: str, draw: Callable[[int], Draw | None], size: int, step: int, new_tokens: int
) -> tuple[Draw, int]:
    """Return a case that fits and its length.

    Args:
        draw: number of pieces to a case; None where there is none of so few.

    Raises:
        UserError: cases of the fewest pieces do not fit.
    """
    length = 0
    for _ in range(_TRIES):
        case = draw(size)
        if case is not None:
            length = job.count(case.text) + new_tokens
            if length <= job.length:
                return case, length
        if size > step:
            size -= step
    raise UserError(
        f"the length {job.length} is too short for {task}: with this tokenizer and prompt a case "
        f"needs about {length} tokens, {new_tokens} to generate included"
    )


def split(draw: Draw, prefix: str, length: int) -> Case:
    """Return a case with the answer's beginning apart; it is found by its first ten characters."""
    at = draw.text.rfind(prefix[:10])
    return Case(draw.text[:at], draw.text[at:], tuple(draw.answers), length)
