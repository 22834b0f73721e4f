# SPDX-License-Identifier: Apache-2.0
"""Retrieval from a list of lines: LongChat's lines and Lost in the Middle's key-value pairs.

A haystack is asked for several of its lines, spread evenly from the first to the last.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable

import numpy as np

from megatron_cream.evaluation.filler import names, spread
from megatron_cream.evaluation.haystacks import Draft, Haystack, Kit, Question, rng

_LINES_INTRO = (
    "Below is a record of lines. Each line has a name and a number, its REGISTER_CONTENT. "
    "Remember the number of every line.\n\n"
)
_KV_INTRO = "Extract the value of the given key from the JSON object below.\n\nJSON data:\n"
_MOST_LINES = 30000


def longchat(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """Lines ``line NAME: REGISTER_CONTENT is <NUMBER>``, as LongChat-Lines has them."""
    draw = _asking(_longchat_line, longchat_question, _LINES_INTRO, "", seed, cases)
    return [kit.fit("longchat-lines", draw, length, seed, least=cases, most=_MOST_LINES)]


def longchat_shot(seed: int) -> Draft:
    """Three lines and one question."""
    return _asking(_longchat_line, longchat_question, _LINES_INTRO, "", seed, 1)(3)


def longchat_question(name: str, number: str, where: float) -> Question:
    """Ask for a line's number."""
    return Question(
        f"\nNow the record is over. What is the REGISTER_CONTENT in line {name}?",
        f"\nThe REGISTER_CONTENT in line {name} is <",
        (number,),
        where,
    )


def kv(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """A JSON object of UUIDs, as in Lost in the Middle (2307.03172)."""
    draw = _asking(_kv_line, kv_question, _KV_INTRO, "{", seed, cases)
    return [kit.fit("kv-retrieval", draw, length, seed, least=cases, most=_MOST_LINES)]


def kv_shot(seed: int) -> Draft:
    """Three pairs and one question."""
    return _asking(_kv_line, kv_question, _KV_INTRO, "{", seed, 1)(3)


def kv_question(key: str, value: str, where: float) -> Question:
    """Ask for a key's value."""
    return Question(f'\nKey: "{key}"', '\nCorresponding value: "', (value,), where)


def _longchat_line(name: str, number: str) -> str:
    return f"line {name}: REGISTER_CONTENT is <{number}>\n"


def _kv_line(key: str, value: str) -> str:
    return f'"{key}": "{value}",\n '


@functools.lru_cache(maxsize=8)
def _numbered(seed: int) -> tuple[tuple[str, str], ...]:
    draw = rng("longchat-lines", seed)
    numbers = draw.integers(10000, 100000, size=_MOST_LINES)
    return tuple(zip(names(draw, _MOST_LINES), map(str, numbers), strict=True))


@functools.lru_cache(maxsize=8)
def _identified(seed: int) -> tuple[tuple[str, str], ...]:
    draw = rng("kv-retrieval", seed)
    return tuple((_uuid(draw), _uuid(draw)) for _ in range(_MOST_LINES))


def _uuid(draw: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=draw.bytes(16), version=4))


def _asking(
    line: Callable[[str, str], str],
    question: Callable[[str, str, float], Question],
    intro: str,
    begin: str,
    seed: int,
    cases: int,
) -> Callable[[int], Draft]:
    """Return a function of the number of lines; the first line begins with ``begin``."""
    pairs = _identified(seed) if question is kv_question else _numbered(seed)

    def draw(count: int) -> Draft:
        body = [line(*pair) for pair in pairs[:count]]
        if begin:  # a JSON object
            body = [begin + body[0], *body[1:]]
            body[-1] = body[-1].rstrip(" ,\n") + "}\n"
        places = [round(place * (count - 1)) for place in spread(cases)]
        asked = [question(*pairs[i], i / max(1, count - 1)) for i in places]
        return Draft(intro, body, asked)

    return draw
