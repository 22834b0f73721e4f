# SPDX-License-Identifier: Apache-2.0
"""Draws one task: what is drawn once, and its passages of text for any size of it.

A task has a size, the number of records or of hundreds of characters; its text is a pure function
of that, so that the size can be fitted to a number of tokens.

Templates (``retrieval_tables/wordings.json``) have ``{k}`` and ``{v}`` for key and value, ``{t}``
for what the values are ("access code"), ``{i}`` for the number of the record and ``{n}`` for a
number that means nothing. A question is asked and answered; what stands before ``{v}`` in it is all
that a model sees when it answers. None is a wording of ``megatron_cream.evaluation``, and some are
near to each of its tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cream.corpus.retrieval_words import (
    KEYS,
    VALUES,
    WORDINGS,
    Haystack,
    Rng,
    passkeys,
    prose,
)

CHARACTERS = 100
"""Characters of a needle task's text that one more of its size stands for."""

MOST_QUESTIONS = 64
"""Questions of a task, at most, unless another number is asked for."""


@dataclass(frozen=True)
class RecordFormat:
    """One way to write a list of records.

    Attributes:
        intros: what may stand before it; may be empty.
        opening, record, closing: the list; ``closing`` takes the place of ``cut`` at its end.
        cut: characters at the end of the last record that ``closing`` replaces.
        questions: each a question and its answer.
    """

    intros: tuple[str, ...]
    record: str
    questions: tuple[str, ...]
    opening: str = ""
    closing: str = ""
    cut: int = 0


@dataclass(frozen=True)
class NeedleWording:
    """One way to hide facts in other text.

    Attributes:
        intros: what may stand before; may be empty.
        needle: the fact, with a space before it.
        questions: as in ``RecordFormat``.
    """

    intros: tuple[str, ...]
    needle: str
    questions: tuple[str, ...]


def _read_templates(kind: Any, entry: dict[str, Any]) -> Any:
    """Questions stand in an entry, or under their name in ``shared_questions``."""
    given = entry["questions"]
    questions = tuple(WORDINGS["shared_questions"][given] if isinstance(given, str) else given)
    return kind(**{**entry, "intros": tuple(entry["intros"]), "questions": questions})


RECORDS: dict[str, RecordFormat] = {
    name: _read_templates(RecordFormat, entry) for name, entry in WORDINGS["records"].items()
}
NEEDLES, PASSKEYS = (
    tuple(_read_templates(NeedleWording, entry) for entry in WORDINGS[name])
    for name in ("needles", "passkeys")
)

_MOST_NEEDLES = 24
_SEGMENTS = 4


@dataclass(frozen=True)
class Passage:
    """A stretch of a task's text.

    Attributes:
        text: what it says.
        is_answer: whether it is an answer with what ends it: a quotation mark, the line break.
    """

    text: str
    is_answer: bool = False


@dataclass(frozen=True)
class RetrievalTask:
    """A task of any size.

    Attributes:
        name: of the kind, for the record.
        most: largest size.
        passages: size to the text's passages; together they begin with no white space and end in
            one line break.
    """

    name: str
    most: int
    passages: Callable[[int], list[Passage]] = field(repr=False)

    def text(self, size: int) -> str:
        """Return the whole text of a size."""
        return "".join(passage.text for passage in self.passages(size))


def draw_task(
    rng: Rng, tokens: int, haystack: Haystack | None, questions: int = MOST_QUESTIONS
) -> RetrievalTask:
    """Draw a task that can be made as long as ``tokens``, of at most so many ``questions``."""
    kind = rng.random()
    if kind < 0.64:
        return _records(rng, tokens, questions)
    if kind < 0.88:
        return _needles(rng, tokens, haystack, questions)
    return _hidden(rng, tokens, haystack, PASSKEYS, [""], passkeys(rng, 1))


def _records(rng: Rng, tokens: int, questions: int = MOST_QUESTIONS) -> RetrievalTask:
    name = str(rng.choice(list(RECORDS)))
    style, thing, most = RECORDS[name], str(rng.choice(WORDINGS["things"])), max(4, tokens // 8)
    keys = KEYS[str(rng.choice(list(KEYS)))](rng, most)
    values = VALUES[str(rng.choice(list(VALUES)))](rng, most)
    numbers = rng.integers(1, 1000, size=most).tolist()
    first = int(rng.integers(1, 5000))
    records = [
        style.record.format(k=k, v=v, t=thing, i=first + i, n=n)
        for i, (k, v, n) in enumerate(zip(keys, values, numbers, strict=True))
    ]
    intro = str(rng.choice(style.intros)).format(t=thing) + style.opening.format(t=thing)
    asked = _Questions.drawn(rng, questions, style.questions, thing, keys, values)
    segments = int(rng.integers(2, _SEGMENTS + 1)) if rng.random() < 0.3 else 1
    return RetrievalTask(
        name,
        most,
        lambda size: [Passage(intro), *_listed(style, records[:size], asked, segments)],
    )


def _listed(
    style: RecordFormat, records: list[str], asked: _Questions, segments: int
) -> list[Passage]:
    """Records in some segments, each followed by its share of the questions."""
    passages: list[Passage] = []
    size = len(records)
    borders = [round(size * (i + 1) / segments) for i in range(segments)]
    for i, (start, end) in enumerate(zip([0, *borders], borders, strict=False)):
        piece = "".join(records[start:end])
        if end == size:
            piece = piece[: len(piece) - style.cut] + style.closing.format()
        passages += [Passage(piece), *asked.passages(end, i, segments)]
    return passages


@dataclass(frozen=True)
class _Questions:
    """Questions about some of the facts.

    Attributes:
        question: its template.
        thing: what the values are.
        keys, values: the facts.
        places: float64 ``[questions]`` from 0 to 1, which facts are asked for.
    """

    question: str
    thing: str
    keys: list[str]
    values: list[str]
    places: np.ndarray

    @classmethod
    def drawn(
        cls,
        rng: Rng,
        most: int,
        wordings: tuple[str, ...],
        thing: str,
        keys: list[str],
        values: list[str],
    ) -> _Questions:
        places = rng.random(int(rng.integers(max(1, most // 4), most + 1)))
        return cls(str(rng.choice(wordings)), thing, keys, values, places)

    def passages(self, facts: int, part: int = 0, parts: int = 1) -> list[Passage]:
        """Questions about the first ``facts`` facts, the share of one of several parts."""
        places = self.places[: max(1, facts // 3)][part::parts]
        chosen = dict.fromkeys((places * facts).astype(int).tolist())
        return [passage for i in chosen for passage in self.ask(i)]

    def ask(self, fact: int) -> list[Passage]:
        """A question about one fact, and its answer to the end of the template."""
        before, after = self.question.split("{v}")
        words = {"k": self.keys[fact], "v": self.values[fact], "t": self.thing}
        return [
            Passage(before.format(**words)),
            Passage(("{v}" + after).format(**words), is_answer=True),
        ]


def _needles(rng: Rng, tokens: int, haystack: Haystack | None, questions: int) -> RetrievalTask:
    count = round(float(2 ** rng.uniform(0, np.log2(_MOST_NEEDLES))))
    keys = KEYS[str(rng.choice(list(KEYS)))](rng, count)
    values = VALUES[str(rng.choice(list(VALUES)))](rng, count)
    return _hidden(rng, tokens, haystack, NEEDLES, keys, values, questions)


def _hidden(
    rng: Rng,
    tokens: int,
    haystack: Haystack | None,
    wordings: tuple[NeedleWording, ...],
    keys: list[str],
    values: list[str],
    questions: int = MOST_QUESTIONS,
) -> RetrievalTask:
    wording, thing = wordings[rng.integers(len(wordings))], str(rng.choice(WORDINGS["things"]))
    needles = [wording.needle.format(k=k, v=v, t=thing) for k, v in zip(keys, values, strict=True)]
    most = max(1, tokens * 8 // CHARACTERS)
    filler = _filler(rng, most * CHARACTERS, haystack, refrain=wordings is PASSKEYS)
    intro, places = str(rng.choice(wording.intros)).format(t=thing), rng.random(len(keys))
    asked = _Questions.drawn(rng, questions, wording.questions, thing, keys, values)
    # All that fit are asked for: a needle that is not is a line of noise.
    chosen = rng.permutation(len(keys))[: len(asked.places)].tolist()
    answered = [passage for i in chosen for passage in asked.ask(i)]

    def passages(size: int) -> list[Passage]:
        hidden = _planted(filler[: size * CHARACTERS], needles, places)
        return [Passage(f"{intro}{hidden}\n"), *answered]

    return RetrievalTask("passkey" if wordings is PASSKEYS else "needles", most, passages)


def _filler(rng: Rng, characters: int, haystack: Haystack | None, refrain: bool) -> str:
    kind = rng.random()
    if refrain and kind < 0.4:
        sentence = str(rng.choice(WORDINGS["refrains"]))
        return (sentence * (1 + characters // len(sentence))).lstrip()[:characters]
    if haystack is None or kind < 0.6:
        return prose(rng, characters)[:characters]
    return haystack.passage(rng, characters).lstrip()


def _planted(filler: str, needles: list[str], places: np.ndarray) -> str:
    """Put needles behind sentences of filler, or else between words, each at its place 0 to 1."""
    cuts = [_cut(filler, int(place * len(filler))) for place in places.tolist()]
    text, done = [], 0
    for at, needle in sorted(zip(cuts, needles, strict=True)):
        text += [filler[done:at], needle]
        done = at
    return "".join([*text, filler[done:]])


def _cut(text: str, near: int) -> int:
    sentence = text.find(". ", near, near + 400)
    if sentence >= 0:
        return sentence + 1
    word = text.find(" ", near, near + 400)
    return len(text) if word < 0 else word
