# SPDX-License-Identifier: Apache-2.0
"""Compares several finished runs of one task in one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results import joined_table
from megatron_cream.evaluation.store import (
    CONTENT,
    RESULT_FILE,
    SETTINGS_FILE,
    note_missing_matplotlib,
    write_table,
    write_whole,
)

# What must be the same for runs to be compared; missing in a run of another kind of task.
_SAME = (
    *("task", "prompt", "shots", "seeds", "first_seed", "cases", "cases_file", "most_tokens"),
    *("records_of", "query_aware", "samples", "ruler_tasks"),
    *("haystack_content", "qa_content", "words_content"),
    *("data", "documents", "document_tokens", "stride", "truncate", "key_tokens"),
)


def compare(runs: Sequence[str], output: str | None) -> str:
    """Return the table of ``runs``; write table.md, result.json and picture.png to ``output``.

    Raises:
        FileNotFoundError: a run that is not finished.
        UserError: runs of different tasks, or of different cases.
    """
    if output is not None:
        _validate_folder(Path(output))
    results = [read_result(run) for run in runs]
    for run, result in zip(runs, results, strict=True):
        _validate_same_cases(runs[0], results[0], run, result)
    results = with_different_names(runs, results)
    table = joined_table(results)
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESULT_FILE, (json.dumps(results, indent=2) + "\n").encode())
        write_table(folder, table, results)
        note_missing_matplotlib()
    return table


def _validate_folder(folder: Path) -> None:
    """Refuse a folder with files of those names that an earlier comparison did not write."""
    written = folder / RESULT_FILE
    if (folder / SETTINGS_FILE).exists() or (written.exists() and not _is_list(written)):
        raise UserError(
            f"--output is {folder}: it has results of something else, which would be overwritten; "
            "it must be a new folder, or that of an earlier comparison"
        )


def _is_list(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), list)
    except (ValueError, RecursionError):
        return False


def _validate_same_cases(
    first: str, wanted: dict[str, Any], run: str, found: dict[str, Any]
) -> None:
    for key in different_settings(wanted, found)[:1]:
        raise UserError(
            f"RUN {run} has {key} {found.get(key)}: {first} has {wanted.get(key)}; runs to "
            "compare must have the same cases"
        )


def different_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return which of the settings that decide the cases differ between two results."""
    of_both = [key for key in CONTENT if key in one and key in other]
    return [key for key in (*_SAME, *of_both) if one.get(key) != other.get(key)]


def with_different_names(
    runs: Sequence[str | Path], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Name runs by their folders where two models have the same name."""
    if len({result["name"] for result in results}) == len(results):
        return results
    return [{**result, "name": Path(run).name} for run, result in zip(runs, results, strict=True)]
