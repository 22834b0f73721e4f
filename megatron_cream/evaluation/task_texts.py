# SPDX-License-Identifier: Apache-2.0
"""Says what the haystacks of tasks read, and what is asked about them.

Passkey and needle have one needle per haystack, so each depth is a haystack of its own; the other
placed tasks are asked several questions about one haystack, spread over it. Each case of a counting
task is a haystack. RULER takes the answer's words in any order. Scoring without generation needs
one order, so the question asks for one: alphabetical for common words, most frequent first for
frequent ones.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources

import numpy as np

from megatron_cream.errors import UserError


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


_PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_PASSKEY_FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_NEEDLE_INTRO = "Read the text below and remember what it says. A question follows.\n"
_KEYS_INTRO = (
    "Some special numbers are hidden in the text below. Remember them. I will ask for one of them "
    "afterwards.\n"
)
_CHAINS_INTRO = (
    "Memorize and track the chains of variable assignments that are hidden in the text below.\n"
)
_HOPS = 4
_ACTIONS = ("eat", "paint", "hide", "photograph", "repair", "sell", "collect", "admire")


def passkey(seed: int, case: int, depth: float, count: int) -> HaystackText:
    """Return five digits at a depth, in the phrases of Landmark Attention (2305.16300)."""
    key = str(rng("passkey", seed, case).integers(10000, 100000))
    text = f" The pass key is {key}. Remember it. {key} is the pass key."
    question = Question("\nWhat is the pass key?", " The pass key is", (f" {key}",), depth)
    return HaystackText(
        _PASSKEY_INTRO, _planted([_PASSKEY_FILLER] * count, {depth: text}), [question]
    )


def needle(seed: int, case: int, depth: float, count: int) -> HaystackText:
    """Return a sentence at a depth; the answer is its last words, token by token."""
    draw = rng("needle", seed, case)
    place, thing, day = (draw.choice(words) for words in (NOUNS, NOUNS, ADJECTIVES))
    doing = draw.choice(_ACTIONS)
    cue = f" The best thing to do at the {place} museum is to"
    answer = f" {doing} a {thing} on a {day} day"
    question = Question(
        f"\nWhat is the best thing to do at the {place} museum?", cue, (answer,), depth
    )
    body = _planted(list(sentences(seed, count)), {depth: f"{cue}{answer}."})
    return HaystackText(_NEEDLE_INTRO, body, [question])


def multikey(seed: int, cases: int, count: int, extra: int = 2) -> HaystackText:
    """Return keys with numbers in prose, ``extra`` of them not asked for (niah_multikey_1)."""
    draw = rng("niah-multikey", seed)
    keys = names(draw, cases + extra)
    numbers = [str(n) for n in draw.integers(1000000, 10000000, size=len(keys))]
    depths = even_places(cases) + [float(depth) for depth in draw.random(extra)]
    cues = [f" The special magic number for {key} is:" for key in keys]
    texts = [f"{cue} {number}." for cue, number in zip(cues, numbers, strict=True)]
    questions = [f"\nWhat is the special magic number for {key}?" for key in keys]
    asked = [Question(questions[i], cues[i], (f" {numbers[i]}",), depths[i]) for i in range(cases)]
    filler = list(sentences(seed, count))
    return HaystackText(_KEYS_INTRO, _planted(filler, dict(zip(depths, texts, strict=True))), asked)


def variables(seed: int, cases: int, count: int) -> HaystackText:
    """Return chains of assignments of four hops each, one question per chain (2404.06654)."""
    draw = rng("variable-tracking", seed)
    letters = draw.permutation(26**3)[: cases * (_HOPS + 1)]
    words = [_letters(int(n)) for n in letters]
    values = draw.permutation(90000)[:cases] + 10000
    texts: dict[float, str] = {}
    asked = []
    for case in range(cases):
        chain = words[case::cases]
        depths = sorted(float(depth) for depth in draw.random(_HOPS + 1))
        sources = [str(values[case]), *(f"VAR {name}" for name in chain)]
        for depth, name, source in zip(depths, chain, sources, strict=False):
            texts[depth] = f" VAR {name} = {source}."
        asked.append(_chain_question(str(values[case]), chain, sum(depths) / len(depths)))
    return HaystackText(_CHAINS_INTRO, _planted([_PASSKEY_FILLER] * count, texts), asked)


def _chain_question(value: str, chain: list[str], where: float) -> Question:
    items = (f" {chain[0]}", *(f", {name}" for name in chain[1:]))
    return Question(
        f"\nFind all variables that are assigned the value {value} in the text above, in order.",
        f" The {len(chain)} variables that are assigned the value {value} are:",
        items,
        where,
    )


def _letters(number: int) -> str:
    """Return three letters, as base 26."""
    return "".join(chr(65 + number // 26**i % 26) for i in (2, 1, 0))


def _planted(filler: list[str], needles: dict[float, str]) -> list[str]:
    """Put needles between pieces of filler, each at its depth from 0 (first) to 1 (last)."""
    body = list(filler)
    for depth in sorted(needles, reverse=True):
        body.insert(round(depth * len(filler)), needles[depth])
    return body


MOST_LINES = 30000
_LINES_INTRO = (
    "Below is a record of lines. Each line has a name and a number, its REGISTER_CONTENT. "
    "Remember the number of every line.\n\n"
)
_KV_INTRO = "Extract the value of the given key from the JSON object below.\n\nJSON data:\n"


def longchat(seed: int, cases: int, count: int) -> HaystackText:
    """Return lines ``line NAME: REGISTER_CONTENT is <NUMBER>``, as LongChat-Lines has them."""
    pairs = _names_and_numbers(seed)[:count]
    body = [f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in pairs]
    return HaystackText(_LINES_INTRO, body, _questions(pairs, cases, _line_question))


def key_values(seed: int, cases: int, count: int, *, aware: int | None = None) -> HaystackText:
    """Return a JSON object of UUIDs, as in Lost in the Middle (2307.03172).

    Args:
        aware: ask question ``aware`` alone, and name its key in front of the object as well.
    """
    pairs = _pairs_of_uuids(seed)[:count]
    body = [f'"{key}": "{value}",\n ' for key, value in pairs]
    body[0] = "{" + body[0]
    body[-1] = body[-1].rstrip(" ,\n") + "}\n"
    asked = _questions(pairs, cases, key_question)
    if aware is None:
        return HaystackText(_KV_INTRO, body, asked)
    before, after = _KV_INTRO.split("\n\n")
    intro = f"{before}\n{asked[aware].text}\n\n{after}"
    return HaystackText(intro, body, [asked[aware]])


@lru_cache(maxsize=8)
def _names_and_numbers(seed: int) -> tuple[tuple[str, str], ...]:
    draw = rng("longchat-lines", seed)
    numbers = draw.integers(10000, 100000, size=MOST_LINES)
    return tuple(zip(names(draw, MOST_LINES), map(str, numbers), strict=True))


@lru_cache(maxsize=8)
def _pairs_of_uuids(seed: int) -> tuple[tuple[str, str], ...]:
    draw = rng("kv-retrieval", seed)
    return tuple((_uuid(draw), _uuid(draw)) for _ in range(MOST_LINES))


def _uuid(draw: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=draw.bytes(16), version=4))


def _questions(
    pairs: Sequence[tuple[str, str]], cases: int, question: Callable[[str, str, float], Question]
) -> list[Question]:
    last = len(pairs) - 1
    places = [round(place * last) for place in even_places(cases)]
    return [question(*pairs[i], i / max(1, last)) for i in places]


def _line_question(name: str, number: str, where: float) -> Question:
    return Question(
        f"\nNow the record is over. What is the REGISTER_CONTENT in line {name}?",
        f"\nThe REGISTER_CONTENT in line {name} is <",
        (number,),
        where,
    )


def key_question(key: str, value: str, where: float) -> Question:
    """Return the question for the value of one key, as Lost in the Middle asks it."""
    return Question(f'\nKey: "{key}"', '\nCorresponding value: "', (value,), where)


_COMMON_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_FREQUENT_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words.\n"
)
_COMMON = 10
_LONG = 4096  # from here on RULER's frequencies; shorter cases would not fit them
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
MOST_COMMON = MOST_NAMES - _COMMON
MOST_FREQUENT = len(_SYLLABLES) ** 3 - 1


def common_texts(length: int, seed: int, cases: int) -> list[Callable[[int], HaystackText]]:
    """Return ten words 30 times each among words that stand there 3 times (10, 1 below 4096)."""
    times = (30, 3) if length >= _LONG else (10, 1)
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
    top = words[1:4]
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
    weights = np.arange(1, count + 1) ** -2.0
    times = np.maximum(1, np.round(count * weights / weights.sum())).astype(int)
    return [int(n) for n in times[: 4 + count // 8]]


def _invented(draw: np.random.Generator, count: int) -> list[str]:
    """Return different words of three syllables."""
    size = len(_SYLLABLES)
    if count > size**3:
        raise UserError(f"{count} invented words are needed: there are {size**3}")
    chosen = draw.permutation(size**3)[:count]
    return ["".join(_SYLLABLES[n // size**i % size] for i in (2, 1, 0)) for n in chosen]
