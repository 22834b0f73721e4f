# SPDX-License-Identifier: Apache-2.0
"""Counting words over the whole context, after RULER (2404.06654); one case per haystack.

RULER takes the answer's words in any order. Scoring without generation needs one order, so the
question asks for one: alphabetical for common words, most frequent first for frequent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.haystacks import MOST_NAMES, HaystackText, Question, names, rng

_COMMON_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_FREQUENT_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words.\n"
)
_COMMON = 10
LONG = 4096  # from here on RULER's frequencies; shorter cases would not fit them
_TOP = 3
_ALPHA = 2.0
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
MOST_COMMON = MOST_NAMES - _COMMON
MOST_FREQUENT = len(_SYLLABLES) ** 3 - 1


def common_texts(length: int, seed: int, cases: int) -> list[Callable[[int], HaystackText]]:
    """Return ten words 30 times each among words that stand there 3 times (10, 1 below 4096)."""
    times = (30, 3) if length >= LONG else (10, 1)
    return [partial(common, seed, case, _COMMON, times) for case in range(cases)]


def common(seed: int, case: int, answers: int, times: tuple[int, int], count: int) -> HaystackText:
    """Return a list of ``answers`` common words and ``count`` others, each so many times."""
    draw = rng("common-words", seed, case)
    words = names(draw, answers + count)
    asked, others = sorted(words[:answers]), words[answers:]
    listed = np.array(asked * times[0] + others * times[1])
    body = [f"{i}. {word}\n" for i, word in enumerate(draw.permutation(listed), 1)]
    question = Question(
        f"\nWhat are the {answers} most common words in the above list, in alphabetical order?",
        f" The {answers} most common words, in alphabetical order, are:",
        (f" {asked[0]}", *(f", {word}" for word in asked[1:])),
        0.5,
    )
    return HaystackText(_COMMON_INTRO, body, [question])


def frequent(seed: int, case: int, count: int) -> HaystackText:
    """Return invented words whose frequencies fall as rank ** -2; dots are the most frequent."""
    draw = rng("frequent-words", seed, case)
    words = _invented(draw, 1 + count)
    body = draw.permutation([word for i, n in enumerate(_zipf(count)) for word in [i] * n])
    texts = [f" {'...' if i == 0 else words[i]}" for i in body]
    top = words[1 : _TOP + 1]
    question = Question(
        "\nDo not count the dots. What are the three most frequently appeared words in the above "
        "coded text, the most frequent first?",
        " The three most frequently appeared words, the most frequent first, are:",
        (f" {top[0]}", *(f", {word}" for word in top[1:])),
        0.5,
    )
    return HaystackText(_FREQUENT_INTRO, texts, [question])


def _zipf(count: int) -> list[int]:
    """Return how often each rank stands in a text of about ``count`` words; four differ."""
    weights = np.arange(1, count + 1) ** -_ALPHA
    times = np.maximum(1, np.round(count * weights / weights.sum())).astype(int)
    return [int(n) for n in times[: 4 + count // 8]]


def _invented(draw: np.random.Generator, count: int) -> list[str]:
    """Return different words of three syllables."""
    size = len(_SYLLABLES)
    if count > size**3:
        raise UserError(f"{count} invented words are needed: there are {size**3}")
    chosen = draw.permutation(size**3)[:count]
    return ["".join(_SYLLABLES[n // size**i % size] for i in (2, 1, 0)) for n in chosen]
