# SPDX-License-Identifier: Apache-2.0
"""Draws keys and values of many kinds, passages of the user's text, and prose where there is none.

Nothing here can stand in a case of ``megatron_cream.evaluation``: no adjective, noun or sentence is
among its own, its UUIDs are of version 4 and these never are. A number is only ever the value of a
key from here, or, where no key goes with it, has another number of digits than a passkey there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.input_files import find_inputs
from megatron_cream.corpus.readers import read_documents
from megatron_cream.errors import UserError

_TABLES = Path(__file__).with_name("retrieval_tables")
ADJECTIVES = (_TABLES / "adjectives.txt").read_text("utf-8").split()
NOUNS = (_TABLES / "nouns.txt").read_text("utf-8").split()
WORDINGS: dict[str, Any] = json.loads((_TABLES / "wordings.json").read_text("utf-8"))
"""How things are said.

``things`` are what values can be; ``openings`` and ``verbs`` make sentences; ``refrains`` are
filler. The others are templates of ``retrieval_tasks``: ``records`` by name, ``needles`` and
``passkeys``.
"""
_SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "lnrsk"]
_PASSKEY_DIGITS = 5
UUID_VERSIONS = "13578"

Rng = np.random.Generator
DrawWords = Callable[[Rng, int], list[str]]


def distinct(draw: DrawWords) -> DrawWords:
    """Return ``draw`` without repetitions."""

    def drawn(rng: Rng, count: int) -> list[str]:
        found = dict.fromkeys(draw(rng, count + count // 8 + 4))
        for _ in range(8):
            if len(found) >= count:
                return list(found)[:count]
            found |= dict.fromkeys(draw(rng, 2 * count))
        raise UserError(f"--length: {count} different keys are needed, take shorter documents")

    return drawn


def digits(least: int, most: int) -> DrawWords:
    """Numbers, all of as many digits, from ``least`` to ``most`` of them."""

    def draw(rng: Rng, count: int) -> list[str]:
        size = int(rng.integers(least, most + 1))
        return list(map(str, rng.integers(10 ** (size - 1), 10**size, size=count).tolist()))

    return draw


def passkeys(rng: Rng, count: int) -> list[str]:
    """Numbers that no key goes with: never of as many digits as those of the evaluation."""
    sizes = [size for size in range(3, 10) if size != _PASSKEY_DIGITS]
    size = int(rng.choice(sizes))
    return list(map(str, rng.integers(10 ** (size - 1), 10**size, size=count).tolist()))


def uuids(rng: Rng, count: int) -> list[str]:
    """UUIDs of another version than 4."""
    version = rng.choice(list(UUID_VERSIONS))
    text = rng.bytes(16 * count).hex()
    rows = (text[i : i + 32] for i in range(0, len(text), 32))
    return [f"{r[:8]}-{r[8:12]}-{version}{r[13:16]}-{r[16:20]}-{r[20:]}" for r in rows]


def hexadecimal(rng: Rng, count: int) -> list[str]:
    """Runs of 6 to 32 hexadecimal digits, all as long."""
    size = 2 * int(rng.integers(3, 17))
    text = rng.bytes(size // 2 * count).hex()
    return [text[i : i + size] for i in range(0, len(text), size)]


def codes(rng: Rng, count: int) -> list[str]:
    """Codes such as ``QX-4821``."""
    letters = rng.integers(65, 91, size=(count, 2))
    numbers = rng.integers(100, 100000, size=count).tolist()
    return [f"{chr(a)}{chr(b)}-{n}" for (a, b), n in zip(letters.tolist(), numbers, strict=True)]


def _pairs(rng: Rng, count: int, form: str) -> list[str]:
    first = rng.integers(len(ADJECTIVES), size=count).tolist()
    second = rng.integers(len(NOUNS), size=count).tolist()
    return [form.format(ADJECTIVES[i], NOUNS[j]) for i, j in zip(first, second, strict=True)]


def names(rng: Rng, count: int) -> list[str]:
    """Names of two words: with a hyphen, an underline or a space."""
    return _pairs(rng, count, str(rng.choice(["{}-{}", "{}-{}", "{}_{}", "{} {}"])))


def phrases(rng: Rng, count: int) -> list[str]:
    """Some words to write down as they stand."""
    return _pairs(rng, count, f"{rng.choice(['a', 'the', 'one'])} {{}} {{}}")


def invented(rng: Rng, count: int) -> list[str]:
    """Invented names of two or three syllables."""
    drawn = rng.integers(len(_SYLLABLES), size=(count, int(rng.integers(2, 4)))).tolist()
    return ["".join(_SYLLABLES[i] for i in row).capitalize() for row in drawn]


def words(rng: Rng, count: int) -> list[str]:
    """Single words."""
    return [NOUNS[i] for i in rng.integers(len(NOUNS), size=count).tolist()]


def amounts(rng: Rng, count: int) -> list[str]:
    """Amounts with two decimals."""
    return [f"{n / 100:.2f}" for n in rng.integers(1000, 10**7, size=count).tolist()]


def dates(rng: Rng, count: int) -> list[str]:
    """Dates as in ISO 8601."""
    days = np.datetime64("1950-01-01") + rng.integers(40000, size=count)
    return list(map(str, days))


KEYS: dict[str, DrawWords] = {
    "names": distinct(names),
    "uuids": distinct(uuids),
    "codes": distinct(codes),
    "invented": distinct(invented),
    "hexadecimal": distinct(hexadecimal),
    "numbers": distinct(digits(5, 8)),
}
VALUES: dict[str, DrawWords] = {
    "numbers": digits(3, 9),
    "uuids": uuids,
    "hexadecimal": hexadecimal,
    "codes": codes,
    "names": names,
    "phrases": phrases,
    "words": words,
    "amounts": amounts,
    "dates": dates,
}


def prose(rng: Rng, characters: int) -> str:
    """Return sentences of at least so many characters, about nothing."""
    sentences, size = [], 0
    while size < characters:
        count = 1 + (characters - size) // 60
        subjects, objects = _pairs(rng, count, "the {} {}"), _pairs(rng, count, "a {} {}")
        openings = rng.integers(len(WORDINGS["openings"]), size=count).tolist()
        verbs = rng.integers(len(WORDINGS["verbs"]), size=count).tolist()
        for i, j, a, b in zip(openings, verbs, subjects, objects, strict=True):
            sentences.append(f"{WORDINGS['openings'][i]} {a} {WORDINGS['verbs'][j]} {b}.")
            size += len(sentences[-1]) + 1
    return " ".join(sentences)


MOST_CHARACTERS = 64 << 20
"""Text that is kept in memory; of more, the same share of every file."""

_SNAP = 200


class Haystack:
    """Passages of some texts.

    Args:
        texts: documents; empty ones are left out.
    """

    def __init__(self, texts: list[str]) -> None:
        self.texts = [text for text in texts if text.strip()]
        self._ends = list(accumulate(map(len, self.texts)))

    def passage(self, rng: Rng, characters: int) -> str:
        """Return about so many characters from a random place on, never more.

        Where a document ends the passage goes on with another one.
        """
        parts, left = [], characters
        while left > 0:
            at = int(rng.integers(self._ends[-1]))
            number = bisect_right(self._ends, at)
            text = self.texts[number]
            start = at - (self._ends[number] - len(text))
            space = text.find(" ", start, start + _SNAP) if start else -1
            part = text[space + 1 if space >= 0 else start :][:left].replace("\r", "")
            parts.append(part + "\n\n" if len(part) + 2 < left else part)
            left -= len(parts[-1])
        return "".join(parts)


def read_haystack(paths: list[str]) -> Haystack:
    """Read files and folders of text.

    Raises:
        UserError: there is no text in them, or it cannot be read.
        FileNotFoundError: there is no such file.
    """
    files = find_inputs(paths, "--haystack").files
    share = MOST_CHARACTERS // max(1, len(files))
    found = Haystack([text for path in files for text in _beginning(path, share)])
    if not found.texts:
        raise UserError(f"--haystack {' '.join(paths)}: holds no text, it must have some")
    return found


def _beginning(path: Path, characters: int) -> list[str]:
    texts = []
    for text in read_documents(path):
        texts.append(text[:characters])
        characters -= len(text)
        if characters <= 0:
            break
    return texts
