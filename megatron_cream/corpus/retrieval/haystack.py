# SPDX-License-Identifier: Apache-2.0
"""The user's own text, to hide needles in and to fill documents up with."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from megatron_cream.corpus.readers import find_inputs, read_documents
from megatron_cream.corpus.retrieval.words import Rng
from megatron_cream.errors import UserError

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
    files = find_inputs(paths).files
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
