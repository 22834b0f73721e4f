# SPDX-License-Identifier: Apache-2.0
"""Reads finished records and results again, and checks every value.

A file that a person edited, a disk damaged or two runs wrote is refused by name, and never counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.results import PER_DOCUMENT, buckets
from megatron_cream.evaluation.ruler import TASKS as RULER_TASKS
from megatron_cream.evaluation.ruler import metric

Check = Callable[[Any], str | None]
"""A value to None where it is right; otherwise to the field of it that is wrong, "" for itself."""

_MOST = 2**53  # whole numbers that a float holds as well


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    """Return whether it is a number; of a broken model it may be NaN or infinite."""
    return isinstance(value, float) or (isinstance(value, int) and _is_whole(abs(value)))


def _if(right: Callable[[Any], bool]) -> Check:
    return lambda value: None if right(value) else ""


def _up_to(most: float) -> Check:
    return _if(lambda value: _is_number(value) and 0 <= value <= most)


_whole, _number, _share, _percent = _if(_is_whole), _if(_is_number), _up_to(1), _up_to(100)
_count = _if(lambda value: _is_whole(value) and value > 0)
_boolean = _if(lambda value: isinstance(value, bool))
_text = _if(lambda value: isinstance(value, str))
_ruler_task = _if(lambda value: value in RULER_TASKS)


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _list_of(check: Check, fewest: int = 1) -> Check:
    def wrong(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) < fewest:
            return ""
        return next((found for entry in value if (found := check(entry)) is not None), None)

    return wrong


def _object(fields: dict[str, Check]) -> Check:
    def wrong(value: Any) -> str | None:
        if not isinstance(value, dict):
            return ""
        for name, check in fields.items():
            if (found := check(value.get(name))) is not None:
                return f"{found} in {name}" if found else name
        return None

    return wrong


@dataclass(frozen=True)
class ScoreFormat:
    """What the scores of a run have, one per line of cases.jsonl.

    Attributes:
        key: fields that tell two of them apart.
        fields: check of each field.
        together: check of a score whose fields are right one by one.
    """

    key: tuple[str, ...]
    fields: dict[str, Check]
    together: Callable[[dict[str, Any]], bool] = lambda record: True

    def is_right(self, record: Any) -> bool:
        """Return whether it is a score of this format."""
        return _object(self.fields)(record) is None and self.together(record)

    def identity(self, record: dict[str, Any]) -> tuple[Any, ...]:
        """Return which one it is."""
        return tuple(record[name] for name in self.key)

    def name(self, record: dict[str, Any]) -> str:
        """Return which one it is, in words."""
        return ", ".join(f"{name} {record[name]}" for name in self.key)


def _fits_buckets(record: dict[str, Any]) -> bool:
    sizes = {len(record["nll"]), len(record["targets"]), len(buckets(record["length"])) - 1}
    return len(sizes) == 1 and sum(record["targets"]) > 0


_CASE: dict[str, Check] = {
    **{"length": _count, "seed": _whole, "haystack": _whole, "index": _whole, "where": _share},
    **{"hit": _boolean, "items": _share, "tokens": _share, "logprob": _number},
    "answer_tokens": _count,
}
CASE_RECORDS = ScoreFormat(("length", "seed", "haystack", "index"), _CASE)
NUMBER_CASE_RECORDS = ScoreFormat(CASE_RECORDS.key, _CASE | {"number": _boolean})
RULER_RECORDS = ScoreFormat(
    ("length", "task", "index"),
    {
        **{"length": _count, "task": _ruler_task, "index": _whole},
        **{"score": _share, "written": _text, "answers": _list_of(_text, 0)},
        **{"written_tokens": _whole, "case_tokens": _count},
    },
)
DOCUMENT_RECORDS = ScoreFormat(
    ("length", "document"),
    {"length": _count, "document": _whole, "nll": _list_of(_number), "targets": _list_of(_whole)},
    _fits_buckets,
)
KEY_DOCUMENT_RECORDS = ScoreFormat(
    DOCUMENT_RECORDS.key,
    DOCUMENT_RECORDS.fields | {"key_nll": _number, "key_targets": _whole},
    _fits_buckets,
)


def read_object(path: Path, flag: str) -> dict[str, Any]:
    """Return the JSON object in a file of a run.

    Raises:
        UserError: there is something else; names ``flag`` and the file.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # also of a text that is not UTF-8
        raise UserError(f"{flag} is {path.parent}: {path.name} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{flag} is {path.parent}: {path.name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag} is {path.parent}: {path.name} must hold a JSON object")
    return found


def read_records(path: Path, text: bytes, kind: ScoreFormat) -> list[dict[str, Any]]:
    """Return the records in ``text``, one per line, each of them once.

    Raises:
        UserError: a line that is no such record, or a record that is there twice.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for at, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not kind.is_right(record):
            raise UserError(
                f"--output is {path.parent}: line {at} of {path.name} is damaged; take another "
                "folder, or delete that line, whose case is then scored again"
            )
        if kind.identity(record) in found:
            raise UserError(
                f"--output is {path.parent}: line {at} of {path.name} has {kind.name(record)} a "
                "second time, as if two runs had written there; take another folder"
            )
        found[kind.identity(record)] = record
    return list(found.values())


_RESULT: dict[str, Check] = {
    "task": _text,
    "name": _text,
    "window": _count,
    "most_tokens": _or_null(_count),
}
_CASE_ROW: dict[str, Check] = {
    **{"length": _count, "cases": _count, "haystacks": _count, "answer_tokens": _or_null(_count)},
    **{"hit": _share, "hit_low": _share, "hit_high": _share, "number": _or_null(_share)},
    **{"items": _share, "tokens": _share, "logprob_per_token": _number},
}
_PLACE_ROW = _CASE_ROW | {"where": _share}
_PERPLEXITY_ROW: dict[str, Check] = {
    **{"length": _count, "perplexity": _number, "low": _or_null(_number)},
    **{"high": _or_null(_number), "documents": _count, "targets": _count, "nll": _number},
    "document_nll": _list_of(_number),
}
_LONGPPL_ROW = _PERPLEXITY_ROW | {
    **{"longppl": _number, "longppl_low": _or_null(_number), "longppl_high": _or_null(_number)},
    **{"key_targets": _count, "document_key_nll": _list_of(_number)},
    "document_key_targets": _list_of(_whole),
}
_POSITION_ROW: dict[str, Check] = {
    **{"length": _count, "from": _whole, "to": _count, "perplexity": _number, "targets": _count},
}
_RULER_RESULT: dict[str, Check] = {
    **{"ruler_tasks": _list_of(_ruler_task), "threshold": _percent},
    **{"weighted_average_increasing": _percent, "weighted_average_decreasing": _percent},
    "effective_length": _or_null(_count),
}
_RULER_ROW: dict[str, Check] = {
    **{"length": _count, "cases": _count, "average": _percent},
    "scores": _if(
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(by_metric, dict) for by_metric in value.values())
            and all(_percent(score) is None for each in value.values() for score in each.values())
        )
    ),
}


def _rows(fields: dict[str, Check]) -> Check:
    return _list_of(_object(fields))


def _result_fields(task: str) -> dict[str, Check] | None:
    """Return the checks of the result of a task, None where there is no such task."""
    if task in PER_DOCUMENT:
        row = _LONGPPL_ROW if task == "longppl" else _PERPLEXITY_ROW
        return _RESULT | {"lengths": _rows(row), "positions": _rows(_POSITION_ROW)}
    if task == "ruler":
        return _RESULT | _RULER_RESULT | {"lengths": _rows(_RULER_ROW)}
    if task not in TASKS:
        return None
    places = {"places": _rows(_PLACE_ROW)} if TASKS[task].placed else {}
    return _RESULT | {"lengths": _rows(_CASE_ROW)} | places


def read_result(folder: str | Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        FileNotFoundError: there are none.
        UserError: a file that is damaged, or no result.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"RUN is {folder}: it must be the --output of a finished run")
    result = read_object(path, "RUN")
    wrong = _wrong(result)
    if wrong is not None:
        raise UserError(
            f"RUN is {folder}: result.json has no right {wrong}; start the run again in that "
            "folder, which writes it anew"
        )
    return result


def _wrong(result: dict[str, Any]) -> str | None:
    """Return what is missing or no such value."""
    task = result.get("task")
    fields = _result_fields(task) if isinstance(task, str) else None
    return "task" if fields is None else _object(fields)(result) or _wrong_together(result)


def _wrong_together(result: dict[str, Any]) -> str | None:
    """Return what is not as in the other rows: pictures pair them."""
    rows = result["lengths"]
    if len({row["length"] for row in rows}) < len(rows):
        return "lengths (one is there twice)"
    if result["task"] in PER_DOCUMENT:
        same = {n for row in rows for n in (row["documents"], len(row["document_nll"]))}
        return "document_nll" if len(same) > 1 else None
    if result["task"] == "ruler":
        wanted = [{task: [metric(task)] for task in result["ruler_tasks"]}] * len(rows)
        found = [{task: list(of_task) for task, of_task in row["scores"].items()} for row in rows]
        return None if found == wanted else "scores in lengths"
    return "number" if len({"number" in row for row in rows}) > 1 else None
