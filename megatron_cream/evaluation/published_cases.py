# SPDX-License-Identifier: Apache-2.0
"""Reads published cases: LongChat's lines, Lost in the Middle's key-value pairs.

A published case has the length that it has; results are gathered under the longest case of a file.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation.haystacks import (
    HaystackBuilder,
    HaystackCases,
    HaystackText,
    Question,
    even_places,
)
from megatron_cream.evaluation.task_texts import key_question

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
