# SPDX-License-Identifier: Apache-2.0
"""Reads what cases are made of: words, essays, questions with documents."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_cream.errors import MissingPackageError, UserError


@dataclass(frozen=True)
class RulerQuestion:
    """A question.

    Attributes:
        answers: any of them is right.
        own: numbers of the documents that it belongs to.
        near: numbers of other documents of the same article, taken before others.
    """

    question: str
    answers: list[str]
    own: list[int]
    near: list[int]


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a file, and its documents in alphabetical order, each once."""

    asked: list[RulerQuestion]
    documents: list[str]


class WordPairs:
    """Every adjective with every noun, in alphabetical order and each once, without a list of them.

    There are six million. Those of an adjective are together, except where another adjective begins
    with it and a hyphen (blue, blue-eyed): such a family has a list.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._families: list[list[str]] = []
        for adjective in sorted(f"{word}-" for word in set(adjectives)):
            if self._families and adjective.startswith(self._families[-1][0]):
                self._families[-1].append(adjective)
            else:
                self._families.append([adjective])
        self._lists = [self._mixed(family) for family in self._families]
        sizes = [len(mixed or self._nouns) for mixed in self._lists]
        self._ends = list(accumulate(sizes))

    def _mixed(self, family: list[str]) -> list[str]:
        if len(family) == 1:
            return []
        return sorted({adjective + noun for adjective in family for noun in self._nouns})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        family = bisect_right(self._ends, index)
        index -= self._ends[family - 1] if family else 0
        mixed = self._lists[family]
        return mixed[index] if mixed else self._families[family][0] + self._nouns[index]


def punkt_sentences(text: str) -> list[str]:
    """Return the sentences of an English text, as NLTK's punkt cuts it.

    Raises:
        MissingPackageError: NLTK or its data is not installed.
    """
    try:
        import nltk
    except ImportError as exc:
        raise MissingPackageError("--haystack needs nltk: pip install nltk", name="nltk") from exc
    try:
        return nltk.sent_tokenize(text)
    except LookupError as exc:
        raise MissingPackageError(
            "--haystack needs NLTK's punkt_tab: python -m nltk.downloader punkt_tab", name="nltk"
        ) from exc


@dataclass
class Materials:
    """Everything that the thirteen tasks draw from; what is not given is empty or None.

    Attributes:
        essay: words of the haystack.
        squad, hotpot: questions of ``qa_1`` and ``qa_2``.
        more_words: RULER's second word list, for ``cwe`` of 128K tokens and more.
        split: text to sentences.
    """

    essay: list[str] = field(default_factory=list)
    squad: QuestionSet | None = None
    hotpot: QuestionSet | None = None
    more_words: list[str] = field(default_factory=list)
    split: Callable[[str], list[str]] = punkt_sentences
    _cut: dict[int, list[str]] = field(default_factory=dict, repr=False)

    @cached_property
    def pairs(self) -> WordPairs:
        """Keys such as ``able-acorn``: every adjective with every noun."""
        return WordPairs(_listed("adjectives"), _listed("nouns"))

    @cached_property
    def words(self) -> list[str]:
        """Nouns, adjectives and verbs."""
        return sorted({*_listed("nouns"), *_listed("adjectives"), *_listed("verbs")})

    def sentences(self, size: int) -> list[str]:
        """Return the sentences of the essay's first words; it is repeated where it is too short."""
        if size not in self._cut:
            words = (self.essay * -(-size // len(self.essay)))[:size]
            self._cut[size] = self.split(" ".join(words).strip())
        return self._cut[size]


def _listed(name: str) -> list[str]:
    path = resources.files("megatron_cream.evaluation.ruler") / "words" / f"{name}.txt"
    return [line.rstrip() for line in path.read_text("utf-8").splitlines()]


def read_haystack(path: str | Path) -> list[str]:
    """Return the words of a text, or of RULER's JSON of essays (``{"text": ...}``).

    Raises:
        UserError, OSError: a file without words, or not UTF-8.
    """
    text: Any = _read(path, "--haystack")
    if str(path).endswith(".json"):
        found = _json(text, path, "--haystack")
        text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--haystack is {path}: it needs a text, or JSON with a text as 'text'")
    return re.sub(r"\s+", " ", text).split(" ")


def read_words(path: str | Path) -> list[str]:
    """Return the words of RULER's english_words.json, an object whose values they are.

    Raises:
        UserError, OSError: a file of another form.
    """
    found = _json(_read(path, "--words"), path, "--words")
    words = list(found.values()) if isinstance(found, dict) else []
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"--words is {path}: it needs a JSON object whose values are words")
    return words


def read_questions(path: str | Path) -> tuple[str, QuestionSet]:
    """Return ``squad`` or ``hotpot``, whichever form the file has, and its questions.

    Raises:
        UserError, OSError: a file of neither form, or without questions.
    """
    found = _json(_read(path, "--qa"), path, "--qa")
    kind, read = ("squad", _squad) if isinstance(found, dict) else ("hotpot", _hotpot)
    try:
        questions = read(found)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise _no_questions(path) from exc
    if not questions.asked:
        raise _no_questions(path)
    return kind, questions


def _no_questions(path: str | Path) -> UserError:
    return UserError(
        f"--qa is {path}: it needs questions in the form of SQuAD or HotpotQA (distractor)"
    )


def _squad(found: dict[str, Any]) -> QuestionSet:
    articles = [article["paragraphs"] for article in found["data"]]
    documents, number = _numbers(part["context"] for parts in articles for part in parts)
    asked = []
    for parts in articles:
        numbers = [number[part["context"]] for part in parts]
        for part in parts:
            own = number[part["context"]]
            near = [i for i in numbers if i != own]
            asked += [
                RulerQuestion(
                    _text(qa["question"]), [_text(a["text"]) for a in qa["answers"]], [own], near
                )
                for qa in part["qas"]
                if not qa.get("is_impossible", False)
            ]
    return QuestionSet(asked, documents)


def _hotpot(found: list[dict[str, Any]]) -> QuestionSet:
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in qa["context"]] for qa in found]
    documents, number = _numbers(text for of_one in texts for text in of_one)
    asked = [
        RulerQuestion(
            _text(qa["question"]), [_text(qa["answer"])], [number[text] for text in own], []
        )
        for qa, own in zip(found, texts, strict=True)
    ]
    return QuestionSet(asked, documents)


def _numbers(texts: Any) -> tuple[list[str], dict[str, int]]:
    documents = sorted({_text(text) for text in texts})
    return documents, {text: i for i, text in enumerate(documents)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _read(path: str | Path, flag: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as exc:
        raise UserError(f"{flag} is {path}: it is not UTF-8 text") from exc


def _json(text: str, path: str | Path, flag: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise UserError(f"{flag} is {path}: it is no JSON ({exc})") from exc
