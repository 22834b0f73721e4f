# SPDX-License-Identifier: Apache-2.0
"""The tasks that count words: the most common ones of a list, the most frequent invented ones."""

from __future__ import annotations

import math
import string

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.fitting import Case, Draw, Job, drawn, largest, split
from megatron_cream.evaluation.ruler.materials import Materials
from megatron_cream.evaluation.ruler.templates import COMMON, FREQUENT, around, fill

COMMON_WORDS = 10
_STEP = 10
_PROBE = 4096  # words of the case that tells how many tokens a word has

CODED_LETTERS = 6
_ZETA_2 = math.pi**2 / 6  # the counts are zeta-distributed with exponent 2


def make_common(job: Job, task: str, materials: Materials, cases: int) -> list[Case]:
    """Return cases of the ten most common words, each behind a worked example."""
    words = list(materials.words)
    job.shuffle(words)
    # words of the example, how often its common and other words stand, and the same of the case
    long = job.length >= 4096
    example, common, other = (40, (10, 3), (30, 3)) if long else (20, (3, 1), (6, 1))
    template = around(COMMON, job.model_template)

    def part(size: int, often: tuple[int, int]) -> tuple[str, list[str]]:
        listed = job.random.sample(_enough(words, materials, size, job.length), size)
        answers = listed[:COMMON_WORDS]
        listed = answers * often[0] + listed[COMMON_WORDS:] * often[1]
        job.shuffle(listed)
        return fill(template, context=_numbered(listed)), answers

    def draw(size: int) -> Draw:
        shot, shown = part(example, common)
        text, answers = part(size, other)
        return Draw(f"{shot} {_numbered(shown)}\n{text}", answers)

    per_word = job.count(draw(_PROBE).text) / _PROBE
    estimate = int(job.length // per_word) * 2
    size = largest(job, draw, _STEP, COMMON.new_tokens, estimate)
    made = (drawn(job, task, draw, size, _STEP, COMMON.new_tokens) for _ in range(cases))
    return [split(case, COMMON.prefix, length) for case, length in made]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _enough(words: list[str], materials: Materials, size: int, length: int) -> list[str]:
    """Return the list to sample from: RULER's second one where the first is too short.

    Raises:
        UserError: the second one is needed and not given, or is too short as well.
    """
    if size <= len(words):
        return words
    if size > len(materials.more_words):
        raise UserError(
            f"cwe of {length} tokens needs {size} words: there are {len(words)} and "
            f"{len(materials.more_words)} in --words; give RULER's english_words.json"
        )
    return materials.more_words


def make_frequent(job: Job, task: str, cases: int) -> list[Case]:
    """Return cases of the three most frequent invented words."""
    most = job.length - FREQUENT.new_tokens
    kinds, step = most // 50, most // 32
    if kinds < COMMON_WORDS:
        raise UserError(f"the length {job.length} is too short for {task}: it needs at least 550")
    template = around(FREQUENT, job.model_template)

    def text(words: list[str], size: int) -> str:
        times = size * (np.arange(1, len(words) + 1) ** -2.0) / _ZETA_2
        listed = [word for word, n in zip(words, times.astype(int), strict=True) for _ in range(n)]
        job.shuffle(listed)
        return fill(template, context=" ".join(listed))

    words, size = _coded(job, kinds), most // CODED_LETTERS
    while job.count(text(words, size)) < most:
        size += step
    size -= step
    made = []
    for _ in range(cases):
        words, fits = _coded(job, kinds), size
        while (tokens := job.count(text(words, fits))) > most:
            fits -= step
            if fits <= 0:
                raise UserError(f"the length {job.length} is too short for {task}")
        draw = Draw(text(words, fits), words[1:4])
        made.append(split(draw, FREQUENT.prefix, tokens + FREQUENT.new_tokens))
    return made


def _coded(job: Job, count: int) -> list[str]:
    """Return invented words, the most frequent first, which is noise."""
    words: list[str] = []
    while len(words) < count or len(set(words)) < count:
        words.append("".join(job.random.choices(string.ascii_lowercase, k=CODED_LETTERS)))
    words = sorted(set(words))
    job.shuffle(words)
    return ["...", *words[1:]]
