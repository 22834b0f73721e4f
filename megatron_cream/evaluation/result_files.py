# SPDX-License-Identifier: Apache-2.0
"""Finished records and results as they are read again: every value is looked at.

A file that a person edited, a disk damaged or two runs wrote is refused by name, and never counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation.tasks import TASKS

Record = dict[str, Any]
Check = Callable[[Any], bool]
_MOST = 2**53  # whole numbers that a float holds as well


def whole(value: Any) -> bool:
    """Say whether it is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def count(value: Any) -> bool:
    """Say whether it is a whole number of at least 1."""
    return whole(value) and value > 0


def number(value: Any) -> bool:
    """Say whether it is a number; what a broken model made of a text may be NaN or infinite."""
    return isinstance(value, float) or (isinstance(value, int) and whole(abs(value)))


def share(value: Any) -> bool:
    """Say whether it is a number from 0 to 1."""
    return number(value) and 0 <= value <= 1


def flag(value: Any) -> bool:
    """Say whether it is true or false."""
    return isinstance(value, bool)


def word(value: Any) -> bool:
    """Say whether it is text."""
    return isinstance(value, str)


def either(check: Check) -> Check:
    """Return ``check`` that lets nothing (null) pass as well."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """Return the check of a list with at least one entry, all of which pass ``check``."""
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))


@dataclass(frozen=True)
class Kind:
    """What one kind of record has.

    Attributes:
        key: fields that tell two records of a run apart.
        fields: check of each field.
        together: check of a record whose fields are right one by one.
    """

    key: tuple[str, ...]
    fields: dict[str, Check]
    together: Callable[[Record], bool] = lambda record: True

    def is_right(self, record: Any) -> bool:
        """Say whether it is a record of this kind."""
        if not isinstance(record, dict) or _wrong_field(record, self.fields):
            return False
        return self.together(record)

    def identity(self, record: Record) -> tuple[int, ...]:
        """Return which one it is."""
        return tuple(record[name] for name in self.key)

    def name(self, record: Record) -> str:
        """Return which one it is, in words."""
        return ", ".join(f"{name} {record[name]}" for name in self.key)


_CASE: dict[str, Check] = {
    **{"length": count, "seed": whole, "haystack": whole, "index": whole, "where": share},
    **{"hit": flag, "items": share, "tokens": share, "logprob": number, "answer_tokens": count},
}
CASES = Kind(("length", "seed", "haystack", "index"), _CASE)
NUMBER_CASES = Kind(CASES.key, _CASE | {"number": flag})


def _fits_buckets(record: Record) -> bool:
    from megatron_cream.evaluation.perplexity import buckets  # which imports torch

    sizes = {len(record["nll"]), len(record["targets"]), len(buckets(record["length"])) - 1}
    return len(sizes) == 1 and sum(record["targets"]) > 0


DOCUMENTS = Kind(
    ("length", "document"),
    {"length": count, "document": whole, "nll": list_of(number), "targets": list_of(whole)},
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


def read_records(path: Path, text: bytes, kind: Kind) -> list[Record]:
    """Return the records in ``text``, one a line, each of them once.

    Raises:
        UserError: a line that is no such record, or a record that is there twice.
    """
    found: dict[tuple[int, ...], Record] = {}
    for at, line in enumerate(text.splitlines(), 1):
        record = _parsed(line)
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


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


_CASE_ROW = {
    **{"length": count, "cases": count, "haystacks": count, "answer_tokens": either(count)},
    **{"hit": share, "hit_low": share, "hit_high": share, "number": either(share)},
    **{"items": share, "tokens": share, "logprob_per_token": number},
}
_PLACE_ROW = _CASE_ROW | {"where": share}
_PERPLEXITY_ROW = {
    **{"length": count, "perplexity": number, "low": either(number), "high": either(number)},
    **{"documents": count, "targets": count, "nll": number, "document_nll": list_of(number)},
}
_POSITION_ROW = {
    **{"length": count, "from": whole, "to": count, "perplexity": number, "targets": count},
}
_RESULT = {"task": word, "name": word, "window": count, "most_tokens": either(count)}


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
    if name := _wrong_field(result, _RESULT):
        return name
    perplexity = result["task"] == "perplexity"
    if not perplexity and result["task"] not in TASKS:
        return "task"
    row = _PERPLEXITY_ROW if perplexity else _CASE_ROW
    kinds = {"lengths": row}
    if perplexity:
        kinds["positions"] = _POSITION_ROW
    elif TASKS[result["task"]].placed:
        kinds["places"] = _PLACE_ROW
    wrong = (_wrong_rows(name, result.get(name), fields) for name, fields in kinds.items())
    return next(filter(None, wrong), None) or _wrong_together(result)


def _wrong_rows(name: str, rows: Any, fields: dict[str, Check]) -> str | None:
    if not list_of(lambda row: isinstance(row, dict))(rows):
        return name
    field = next(filter(None, (_wrong_field(row, fields) for row in rows)), None)
    return field and f"{field} in {name}"


def _wrong_together(result: dict[str, Any]) -> str | None:
    """Return what is not as in the other rows: pictures pair them."""
    rows = result["lengths"]
    if len({row["length"] for row in rows}) < len(rows):
        return "lengths (one is there twice)"
    if result["task"] == "perplexity":
        same = {n for row in rows for n in (row["documents"], len(row["document_nll"]))}
        return "document_nll" if len(same) > 1 else None
    return "number" if len({"number" in row for row in rows}) > 1 else None


def _wrong_field(values: dict[str, Any], fields: dict[str, Check]) -> str | None:
    return next((name for name, check in fields.items() if not check(values.get(name))), None)
