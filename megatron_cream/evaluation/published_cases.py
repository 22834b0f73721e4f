# SPDX-License-Identifier: Apache-2.0
"""Case files as published: LongChat-Lines and Lost in the Middle's key-value pairs.

A case has the length that it has; results are gathered under the longest case of a file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.filler import spread
from megatron_cream.evaluation.haystacks import Draft, Haystack, Kit, Question
from megatron_cream.evaluation.tasks.lines import kv_question

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_KV_INTRO = "Extract the value corresponding to the specified key in the JSON object below."


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
    for number, record in enumerate(found, 1):
        if not isinstance(record, dict):
            raise UserError(f"--cases-file is {path}: case {number} must be a JSON object")
    return found


def content(path: str) -> str:
    """Return a hash of a file: a run is not continued with other cases under the same name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def longchat(record: dict[str, Any], index: int, count: int) -> Draft:
    """Return a case of LongChat-Lines; the prompt is the file's, to the last word.

    Raises:
        ValueError: what is missing or no such value.
    """
    prompt, line = _text(record, "prompt"), _text(record, "correct_line")
    if line not in prompt:
        raise ValueError("its prompt must have its correct_line")
    place = prompt.index(line) / len(prompt)
    names = record.get("random_idx")
    if not (isinstance(names, list) and names and isinstance(names[0], str | int)):
        raise ValueError("its random_idx must be a list that begins with a line's name")
    answer = record.get("expected_number")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or answer == "":
        raise ValueError("its expected_number must be a number")
    cue = f"\nThe <REGISTER_CONTENT> in line {names[0]} is <"
    return Draft(prompt.rstrip(), [], [Question("", cue, (str(answer),), place)])


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {name} must be text")
    return value


def kv(record: dict[str, Any], index: int, count: int) -> Draft:
    """Return a case of Lost in the Middle, its record moved to place ``index`` of ``count``.

    Raises:
        ValueError: what is missing or no such value.
    """
    pairs = record.get("ordered_kv_records")
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise ValueError("its ordered_kv_records must be a list of pairs of text")
    gold = (_text(record, "key"), _text(record, "value"))
    pairs = [tuple(pair) for pair in pairs]
    if gold not in pairs:
        raise ValueError("its ordered_kv_records must have its key and value")
    pairs.remove(gold)
    at = round(spread(count)[index] * len(pairs))
    pairs.insert(at, gold)
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    body = f"{_KV_INTRO}\n\nJSON data:\n{{{lines}}}\n"
    return Draft(body, [], [kv_question(*gold, at / max(1, len(pairs) - 1))])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)


READERS: dict[str, Callable[[dict[str, Any], int, int], Draft]] = {
    "longchat-lines": longchat,
    "kv-retrieval": kv,
}


def check_task(task: str) -> None:
    """Refuse a task without published files.

    Raises:
        UserError: naming those that have some.
    """
    if task not in READERS:
        raise UserError(f"--cases-file is given: {task} has none; {', '.join(READERS)} have")


def read_haystacks(task: str, path: str, kit: Kit, limit: int, places: int) -> list[Haystack]:
    """Return the first ``limit`` cases of a file, key-value pairs at ``places`` gold places each.

    Raises:
        UserError: a task without published files, or a file of another task.
    """
    check_task(task)
    count = places if task == "kv-retrieval" else 1
    drafts = []
    for number, record in enumerate(read_cases(path)[:limit], 1):
        try:
            drafts += [READERS[task](record, index, count) for index in range(count)]
        except ValueError as exc:
            raise UserError(
                f"--cases-file is {path}: case {number} is not of {task}, {exc}"
            ) from None
    cases = [kit.as_is(draft) for draft in drafts]
    longest = max(len(context) + len(tail.tokens) for context, tail in cases)
    return [
        Haystack(np.asarray(context), [tail], longest, number)
        for number, (context, tail) in enumerate(cases)
    ]
