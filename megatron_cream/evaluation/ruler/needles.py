# SPDX-License-Identifier: Apache-2.0
"""The eight tasks that ask for needles: numbers or UUIDs by a key, in one of three haystacks."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from megatron_cream.evaluation.ruler.fitting import Case, Draw, Job, drawn, largest, split
from megatron_cream.evaluation.ruler.materials import Materials
from megatron_cream.evaluation.ruler.templates import NEEDLE, NIAH, NOISE, around, fill

DEPTHS = list(np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int))
"""Places in an essay, in percent."""


@dataclass(frozen=True)
class Needles:
    """One of the eight tasks.

    Attributes:
        haystack: ``noise``, ``essay``, or ``needle`` for needles nobody asks for.
        key, value: ``words``, ``numbers`` or ``uuids``.
        keys: needles of different keys.
        values: needles of one key.
        queries: keys asked for; there are at least so many.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def one(self) -> bool:
        """Whether one value is asked for; the sentences are singular then."""
        return self.queries * self.values == 1


def make(job: Job, task: str, needles: Needles, materials: Materials, cases: int) -> list[Case]:
    """Return the cases of a task."""
    material = _Material(job, needles, materials)
    step = 500 if needles.haystack == "essay" else 25 if job.length >= 4096 else 5
    size = largest(job, material.draw, step, NIAH.new_tokens)
    made = []
    for _ in range(cases):
        draw, length = drawn(job, task, material.draw, size, step, NIAH.new_tokens)
        made.append(split(draw, NIAH.prefix, length))
    return made


@dataclass
class _Material:
    job: Job
    needles: Needles
    materials: Materials

    def draw(self, size: int) -> Draw:
        """Return a case with ``size`` words of an essay, or sentences."""
        needles, job = self.needles, self.job
        keys, values = [], []
        for _ in range(max(needles.keys, needles.queries)):
            keys.append(self._value(needles.key))
            values.append([self._value(needles.value) for _ in range(needles.values)])
        sentences = [
            self._needle(key, value)
            for key, of_key in zip(keys, values, strict=True)
            for value in of_key
        ]
        job.shuffle(sentences)
        context = self._essay(size, sentences) if self._is_essay else self._lines(size, sentences)
        asked = job.random.sample(range(len(keys)), needles.queries)
        answers = [value for i in asked for value in values[i]]
        return Draw(self._text(context, [keys[i] for i in asked]), answers)

    @property
    def _is_essay(self) -> bool:
        return self.needles.haystack == "essay"

    def _value(self, kind: str) -> str:
        if kind == "words":
            return self.job.random.choice(self.materials.pairs)
        if kind == "numbers":
            return str(self.job.random.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=self.job.random.getrandbits(128), version=4))

    def _needle(self, key: str, value: str) -> str:
        return fill(NEEDLE, type_needle_v=self.needles.value, key=key, value=value)

    def _essay(self, size: int, needles: list[str]) -> str:
        sentences = self.materials.sentences(size)
        depths = self.job.random.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), None]
        pieces = []
        for i, needle in enumerate(needles):
            pieces += [" ".join(sentences[cuts[i] : cuts[i + 1]]), needle]
        return " ".join([*pieces, " ".join(sentences[cuts[-2] :])])

    def _lines(self, size: int, needles: list[str]) -> str:
        lines = [NOISE] * size
        if self.needles.haystack == "needle":
            kinds = self.needles.key, self.needles.value
            lines = [self._needle(*map(self._value, kinds)) for _ in range(size)]
        places = sorted(self.job.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _text(self, context: str, keys: list[str]) -> str:
        template, kind = around(NIAH, self.job.model_template), self.needles.value
        if self.needles.one:
            # RULER changes the whole template in this way, the model's words included.
            for plural, singular in (
                ("Some", "A"),
                ("are all", "is"),
                ("are", "is"),
                ("answers", "answer"),
            ):
                template = template.replace(plural, singular)
            kind = kind[:-1]
        query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        return fill(template, type_needle_v=kind, context=context, query=query)
