# SPDX-License-Identifier: Apache-2.0
"""Needles in filler: passkey, a sentence, several keys, chains of variables.

Passkey and needle have one needle a haystack, so each depth is a haystack of its own. Several keys
and several chains stand in one haystack, which is asked for each.
"""

from __future__ import annotations

import functools

from megatron_cream.evaluation.filler import ADJECTIVES, NOUNS, names, sentences, spread
from megatron_cream.evaluation.haystacks import Draft, Haystack, Kit, Question, rng

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
_EXTRA_KEYS = 2
_DOINGS = ("eat", "paint", "hide", "photograph", "repair", "sell", "collect", "admire")


def passkey(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """Five digits at each depth, in the phrases of Landmark Attention (2305.16300)."""
    return _at_depths("passkey", _passkey, kit, length, seed, cases)


def passkey_shot(seed: int) -> Draft:
    """One phrase before and one behind."""
    return _passkey(0.5, seed, 0, 2)


def needle(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """A sentence at each depth; the answer is its last words, token by token."""
    return _at_depths("needle", _needle, kit, length, seed, cases)


def needle_shot(seed: int) -> Draft:
    """Three sentences around the needle."""
    return _needle(0.5, seed, 0, 3)


def _at_depths(name, draft, kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    return [
        kit.fit(name, functools.partial(draft, depth, seed, case), length, seed)
        for case, depth in enumerate(spread(cases))
    ]


def _passkey(depth: float, seed: int, case: int, count: int) -> Draft:
    key = str(rng("passkey", seed, case).integers(10000, 100000))
    text = f" The pass key is {key}. Remember it. {key} is the pass key."
    question = Question("\nWhat is the pass key?", " The pass key is", (f" {key}",), depth)
    return Draft(_PASSKEY_INTRO, planted([_PASSKEY_FILLER] * count, {depth: text}), [question])


def _needle(depth: float, seed: int, case: int, count: int) -> Draft:
    draw = rng("needle", seed, case)
    place, thing, day = (draw.choice(words) for words in (NOUNS, NOUNS, ADJECTIVES))
    doing = draw.choice(_DOINGS)
    cue = f" The best thing to do at the {place} museum is to"
    answer = f" {doing} a {thing} on a {day} day"
    question = Question(
        f"\nWhat is the best thing to do at the {place} museum?", cue, (answer,), depth
    )
    body = planted(list(sentences(seed, count)), {depth: f"{cue}{answer}."})
    return Draft(_NEEDLE_INTRO, body, [question])


def multikey(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """Keys with numbers in prose, some of which are never asked for (RULER's niah_multikey_1)."""
    draw = functools.partial(_keys, seed, cases, _EXTRA_KEYS)
    return [kit.fit("niah-multikey", draw, length, seed)]


def multikey_shot(seed: int) -> Draft:
    """Two keys in three sentences."""
    return _keys(seed, 1, 1, 3)


def _keys(seed: int, cases: int, extra: int, count: int) -> Draft:
    draw = rng("niah-multikey", seed)
    keys = names(draw, cases + extra)
    numbers = [str(n) for n in draw.integers(1000000, 10000000, size=len(keys))]
    depths = spread(cases) + [float(depth) for depth in draw.random(extra)]
    cues = [f" The special magic number for {key} is:" for key in keys]
    texts = [f"{cue} {number}." for cue, number in zip(cues, numbers, strict=True)]
    asked = [
        Question(
            f"\nWhat is the special magic number for {keys[i]}?",
            cues[i],
            (f" {numbers[i]}",),
            depths[i],
        )
        for i in range(cases)
    ]
    filler = list(sentences(seed, count))
    return Draft(_KEYS_INTRO, planted(filler, dict(zip(depths, texts, strict=True))), asked)


def variables(kit: Kit, length: int, seed: int, cases: int) -> list[Haystack]:
    """Chains of assignments of four hops each, one question a chain (RULER, 2404.06654)."""
    draw = functools.partial(_chains, seed, cases)
    return [kit.fit("variable-tracking", draw, length, seed)]


def variables_shot(seed: int) -> Draft:
    """One chain in three phrases."""
    return _chains(seed, 1, 3)


def _chains(seed: int, cases: int, count: int) -> Draft:
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
    return Draft(_CHAINS_INTRO, planted([_PASSKEY_FILLER] * count, texts), asked)


def _chain_question(value: str, chain: list[str], where: float) -> Question:
    items = (f" {chain[0]}", *(f", {name}" for name in chain[1:]))
    return Question(
        f"\nFind all variables that are assigned the value {value} in the text above, in order.",
        f" The {len(chain)} variables that are assigned the value {value} are:",
        items,
        where,
    )


def _letters(number: int) -> str:
    """Three letters, as base 26."""
    return "".join(chr(65 + number // 26**i % 26) for i in (2, 1, 0))


def planted(filler: list[str], needles: dict[float, str]) -> list[str]:
    """Put needles between pieces of filler, each at its depth from 0 (first) to 1 (last)."""
    body = list(filler)
    for depth in sorted(needles, reverse=True):
        body.insert(round(depth * len(filler)), needles[depth])
    return body
