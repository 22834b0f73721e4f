# SPDX-License-Identifier: Apache-2.0
"""Tasks by name; ``task_texts`` says what their haystacks read.

passkey            five digits in a repeated phrase (Mohtashami and Jaggi, 2305.16300)
needle             one sentence in prose, asked for word by word
longchat-lines     the number of one of many lines (LongChat)
kv-retrieval       the value of one of many keys (Lost in the Middle, 2307.03172)
niah-multikey      the number of one of several keys in prose (RULER, 2404.06654)
variable-tracking  the variables that a value reaches (RULER)
common-words       the ten words that stand in a list most often (RULER)
frequent-words     the three most frequent invented words (RULER)
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation import task_texts
from megatron_cream.evaluation.prompts import HaystackBuilder, HaystackCases
from megatron_cream.evaluation.task_texts import HaystackText, Question, even_places, key_question

DrawText = Callable[[int], HaystackText]
"""Number of pieces of a haystack's body to its text; a pure function."""


@dataclass(frozen=True)
class EvaluationTask:
    """One task.

    Attributes:
        name: as the command line has it.
        texts: length, seed and number of cases to one function for each haystack.
        shot: seed to a worked example of a few pieces.
        number: whether the published score is of the first integer of the answer.
        placed: whether the answer stands at a place in the context.
        records: whether its pieces are records that may have prose between them.
        aware: as ``texts``, with the question in front of the context too; None where it cannot be.
        least: smallest number of pieces that makes a haystack; one per case if None.
        most: how many different pieces there are.
    """

    name: str
    texts: Callable[[int, int, int], list[DrawText]]
    shot: Callable[[int], HaystackText]
    number: bool = False
    placed: bool = True
    records: bool = False
    aware: Callable[[int, int, int], list[DrawText]] | None = None
    least: int | None = 1
    most: int = sys.maxsize


def _at_depths(text: Callable[..., HaystackText]) -> Callable[[int, int, int], list[DrawText]]:
    """Return the ``texts`` of a task with a haystack for each depth."""

    def texts(length: int, seed: int, cases: int) -> list[DrawText]:
        return [partial(text, seed, case, depth) for case, depth in enumerate(even_places(cases))]

    return texts


def _together(text: Callable[..., HaystackText]) -> Callable[[int, int, int], list[DrawText]]:
    """Return the ``texts`` of a task whose questions are all about one haystack."""
    return lambda length, seed, cases: [partial(text, seed, cases)]


def _each_aware(text: Callable[..., HaystackText]) -> Callable[[int, int, int], list[DrawText]]:
    """Return the ``aware`` of a task whose questions are otherwise about one haystack."""

    def texts(length: int, seed: int, cases: int) -> list[DrawText]:
        return [partial(text, seed, cases, aware=case) for case in range(cases)]

    return texts


_TASKS = (
    EvaluationTask(
        "passkey",
        _at_depths(task_texts.passkey),
        lambda seed: task_texts.passkey(seed, 0, 0.5, 2),
        number=True,
    ),
    EvaluationTask(
        "needle", _at_depths(task_texts.needle), lambda seed: task_texts.needle(seed, 0, 0.5, 3)
    ),
    EvaluationTask(
        "longchat-lines",
        _together(task_texts.longchat),
        lambda seed: task_texts.longchat(seed, 1, 3),
        number=True,
        records=True,
        least=None,
        most=task_texts.MOST_LINES,
    ),
    EvaluationTask(
        "kv-retrieval",
        _together(task_texts.key_values),
        lambda seed: task_texts.key_values(seed, 1, 3),
        records=True,
        aware=_each_aware(task_texts.key_values),
        least=None,
        most=task_texts.MOST_LINES,
    ),
    EvaluationTask(
        "niah-multikey",
        _together(task_texts.multikey),
        lambda seed: task_texts.multikey(seed, 1, 3, extra=1),
        number=True,
    ),
    EvaluationTask(
        "variable-tracking",
        _together(task_texts.variables),
        lambda seed: task_texts.variables(seed, 1, 3),
    ),
    EvaluationTask(
        "common-words",
        task_texts.common_texts,
        lambda seed: task_texts.common(seed, 0, 2, (3, 1), 2),
        placed=False,
        most=task_texts.MOST_COMMON,
    ),
    EvaluationTask(
        "frequent-words",
        lambda length, seed, cases: [partial(task_texts.frequent, seed, i) for i in range(cases)],
        lambda seed: task_texts.frequent(seed, 0, 40),
        placed=False,
        least=40,
        most=task_texts.MOST_FREQUENT,
    ),
)
TASKS: dict[str, EvaluationTask] = {task.name: task for task in _TASKS}


_KV_INTRO = "Extract the value corresponding to the specified key in the JSON object below."
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_haystacks(
    task: str,
    path: str,
    builder: HaystackBuilder,
    limit: int,
    places: int,
    query_aware: bool = False,
) -> list[HaystackCases]:
    """Return the first ``limit`` cases of a file, key-value pairs at ``places`` gold places each.

    With ``query_aware`` their key stands in front of the pairs as well.

    Raises:
        UserError: a task without published files, or a file of another task.
    """
    validate_has_published(task)
    count = places if task == "kv-retrieval" else 1
    read = partial(_published_pairs, aware=True) if query_aware else _PUBLISHED[task]
    texts = []
    for number, case in enumerate(read_cases(path)[:limit], 1):
        try:
            texts += [read(case, index, count) for index in range(count)]
        except ValueError as exc:
            raise UserError(
                f"--cases-file is {path}: case {number} is not of {task}, {exc}"
            ) from None
    cases = [builder.build_as_is(text) for text in texts]
    longest = max(len(context) + len(tail.tokens) for context, tail in cases)
    return [
        HaystackCases(context, [tail], longest, number)
        for number, (context, tail) in enumerate(cases)
    ]


def validate_has_published(task: str) -> None:
    """Refuse a task without published files.

    Raises:
        UserError: naming those that have some.
    """
    if task not in _PUBLISHED:
        raise UserError(f"--cases-file is given: {task} has none; {', '.join(_PUBLISHED)} have")


def read_cases(path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, also one packed by xz or gzip.

    Raises:
        FileNotFoundError: no such file.
        UserError: an empty file, or one that is not JSONL, or a line that is no object.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--cases-file is {path}: there is no such file")
    try:
        with _OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, lzma.LZMAError, zlib.error, OSError, EOFError, RecursionError) as exc:
        raise UserError(f"--cases-file is {path}: it must be a JSONL file ({exc})") from None
    if not found:
        raise UserError(f"--cases-file is {path}: it is empty")
    for number, case in enumerate(found, 1):
        if not isinstance(case, dict):
            raise UserError(f"--cases-file is {path}: case {number} must be a JSON object")
    return found


def _published_lines(case: dict[str, Any], index: int, count: int) -> HaystackText:
    """Return a case of LongChat-Lines; the prompt is the file's, to the last word.

    Raises:
        ValueError: what is missing or no such value.
    """
    prompt, line = _text(case, "prompt"), _text(case, "correct_line")
    if line not in prompt:
        raise ValueError("its prompt must have its correct_line")
    place = prompt.index(line) / len(prompt)
    found = case.get("random_idx")
    if not (isinstance(found, list) and found and isinstance(found[0], str | int)):
        raise ValueError("its random_idx must be a list that begins with a line's name")
    answer = case.get("expected_number")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or answer == "":
        raise ValueError("its expected_number must be a number")
    cue = f"\nThe <REGISTER_CONTENT> in line {found[0]} is <"
    return HaystackText(prompt.rstrip(), [], [Question("", cue, (str(answer),), place)])


def _published_pairs(
    case: dict[str, Any], index: int, count: int, aware: bool = False
) -> HaystackText:
    """Return a case of Lost in the Middle, its record moved to place ``index`` of ``count``.

    Raises:
        ValueError: what is missing or no such value.
    """
    found = case.get("ordered_kv_records")
    if not isinstance(found, list) or not all(map(_is_pair, found)):
        raise ValueError("its ordered_kv_records must be a list of pairs of text")
    gold = (_text(case, "key"), _text(case, "value"))
    pairs = [tuple(pair) for pair in found]
    if gold not in pairs:
        raise ValueError("its ordered_kv_records must have its key and value")
    pairs.remove(gold)
    at = round(even_places(count)[index] * len(pairs))
    pairs.insert(at, gold)
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    before = f"{_KV_INTRO}\n\n" + f'Key: "{gold[0]}"\n\n' * aware
    intro = f"{before}JSON data:\n{{{lines}}}\n"
    return HaystackText(intro, [], [key_question(*gold, at / max(1, len(pairs) - 1))])


def _text(case: dict[str, Any], name: str) -> str:
    value = case.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {name} must be text")
    return value


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)


_PUBLISHED = {"longchat-lines": _published_lines, "kv-retrieval": _published_pairs}
