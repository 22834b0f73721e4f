# SPDX-License-Identifier: Apache-2.0
"""Several finished runs of one task in one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.evaluation.records import read_result
from megatron_cream.evaluation.tables import joined_table

# What must be the same for runs to be compared; missing in a run of another kind of task.
_SAME = (
    *("task", "prompt", "shots", "seeds", "first_seed", "cases", "cases_file", "most_tokens"),
    *("data", "documents", "document_tokens", "stride"),
)


def compare(runs: Sequence[str], output: str | None) -> str:
    """Return the table of ``runs``; write table.md, result.json and picture.png to ``output``.

    Raises:
        FileNotFoundError: a run that is not finished.
        UserError: runs of different tasks, or of different cases.
    """
    results = [read_result(run) for run in runs]
    for run, result in zip(runs, results, strict=True):
        _check(runs[0], results[0], run, result)
    results = _named_apart(runs, results)
    table = joined_table(results)
    if output is not None:
        from megatron_cream.evaluation.pictures import draw

        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        (folder / "table.md").write_text(table + "\n", "utf-8")
        draw(results, folder / "picture.png")
    return table


def _check(first: str, wanted: dict[str, Any], run: str, found: dict[str, Any]) -> None:
    for key in _SAME:
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"RUN {run} has {key} {found.get(key)}: {first} has {wanted.get(key)}; runs to "
                "compare must have the same cases"
            )


def _named_apart(runs: Sequence[str], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name runs by their folders where two models have the same name."""
    if len({result["name"] for result in results}) == len(results):
        return results
    return [{**result, "name": Path(run).name} for run, result in zip(runs, results, strict=True)]
