# SPDX-License-Identifier: Apache-2.0
"""Case files as published: LongChat-Lines and Lost in the Middle's key-value pairs.

A case has the length that it has; results are gathered under the longest case of a file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.cases import Draft, Haystack, Kit, Question
from megatron_cream.evaluation.filler import spread
from megatron_cream.evaluation.tasks.lines import kv_question

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_KV_INTRO = "Extract the value corresponding to the specified key in the JSON object below."


def read_cases(path: str) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file, also one packed by xz or gzip.

    Raises:
        FileNotFoundError: no such file.
        UserError: an empty file, or one that is not JSONL.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--cases-file is {path}: there is no such file")
    try:
        with _OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError, lzma.LZMAError, OSError, EOFError) as exc:
        raise UserError(f"--cases-file is {path}: it must be a JSONL file ({exc})") from None
    if not found:
        raise UserError(f"--cases-file is {path}: it is empty")
    return found


def content(path: str) -> str:
    """Return a hash of a file: a run is not continued with other cases under the same name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def longchat(record: dict[str, Any], index: int, count: int) -> Draft:
    """Return a case of LongChat-Lines; the prompt is the file's, to the last word."""
    place = record["prompt"].index(record["correct_line"]) / len(record["prompt"])
    name = record["random_idx"][0]
    cue = f"\nThe <REGISTER_CONTENT> in line {name} is <"
    return Draft(record["prompt"].rstrip(), [], [
        Question("", cue, (str(record["expected_number"]),), place)
    ])  # fmt: skip


def kv(record: dict[str, Any], index: int, count: int) -> Draft:
    """Return a case of Lost in the Middle, its record moved to place ``index`` of ``count``."""
    pairs = [tuple(pair) for pair in record["ordered_kv_records"]]
    gold = (record["key"], record["value"])
    pairs.remove(gold)
    at = round(spread(count)[index] * len(pairs))
    pairs.insert(at, gold)
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    body = f"{_KV_INTRO}\n\nJSON data:\n{{{lines}}}\n"
    return Draft(body, [], [kv_question(*gold, at / max(1, len(pairs) - 1))])


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
    try:
        drafts = [
            READERS[task](record, index, count)
            for record in read_cases(path)[:limit]
            for index in range(count)
        ]
    except (KeyError, ValueError, TypeError) as exc:
        if str(exc).startswith("--cases-file"):
            raise
        raise UserError(f"--cases-file is {path}: it is not of {task} ({exc!r})") from None
    cases = [kit.as_is(draft) for draft in drafts]
    longest = max(len(context) + len(tail.tokens) for context, tail in cases)
    return [
        Haystack(np.asarray(context), [tail], longest, number)
        for number, (context, tail) in enumerate(cases)
    ]
