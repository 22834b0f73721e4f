# SPDX-License-Identifier: Apache-2.0
"""Needles in filler: passkey, a sentence, several keys, chains of variables.

Passkey and needle have one needle per haystack, so each depth is a haystack of its own. Several
keys and several chains stand in one haystack, which is asked for each.
"""

from __future__ import annotations

from megatron_cream.evaluation.haystacks import (
    ADJECTIVES,
    NOUNS,
    HaystackText,
    Question,
    names,
    rng,
    sentences,
    spread,
)

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
_DOINGS = ("eat", "paint", "hide", "photograph", "repair", "sell", "collect", "admire")


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
    doing = draw.choice(_DOINGS)
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
    depths = spread(cases) + [float(depth) for depth in draw.random(extra)]
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
