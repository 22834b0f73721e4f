# SPDX-License-Identifier: Apache-2.0
"""Writes what a model could do before and can do after: report.html, and the model card's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_cream
from megatron_cream.evaluation.html_page import (
    html_picture,
    html_settings,
    html_table,
    make_page,
    paragraph,
)
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results import markdown, percent, short
from megatron_cream.evaluation.store import write_whole
from megatron_cream.extend.recipe import ExtendSettings, Recipe
from megatron_cream.positions.plots import has_matplotlib

_HEADING = "## Before and after"
_TITLES = {
    "perplexity": "Perplexity of held-out documents",
    "passkey": "Passkey: five digits in a repeated phrase, % found",
    "needle": "Needle: a sentence in prose, % found",
    "longchat-lines": "The number of one of many lines, % found",
    "niah-multikey": "The number of one of several keys in prose, % found",
}


def write_report(
    settings: ExtendSettings, recipe: Recipe, scores: tuple[Path, Path], tasks: Sequence[str]
) -> Path:
    """Write OUTPUT/report.html, and the same table into OUTPUT/README.md; returns the report.

    Args:
        scores: the folders of the scores before and after, each with one folder per task.
        tasks: what was scored.

    Raises:
        FileNotFoundError, UserError: scores that are missing or damaged.
    """
    pairs = {task: _read_pair(scores, task) for task in tasks}
    rows = _rows(pairs)
    output = Path(settings.output)
    pictures = [
        f"<h3>{_title(task)}</h3>{html_picture(results, _title(task))}"
        for task, results in pairs.items()
        if has_matplotlib()
    ]
    body = [
        *(paragraph(recipe.describe()), "<h2>Before and after</h2>", html_table(rows)),
        *(paragraph(_note(pairs)), *pictures, "<h2>Settings</h2>", html_settings(vars(settings))),
        paragraph(f"megatron_cream {megatron_cream.__version__}"),
    ]
    report = output / "report.html"
    title = f"{output.name}: {recipe.window} to {recipe.target} tokens"
    write_whole(report, make_page(title, "".join(body)).encode())
    _add_to_card(output / "README.md", f"{markdown(rows)}\n\n{_note(pairs)}")
    return report


def _read_pair(scores: tuple[Path, Path], task: str) -> list[dict[str, Any]]:
    before, after = (read_result(folder / task) for folder in scores)
    return [{**before, "name": "before"}, {**after, "name": "after"}]


def _rows(pairs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    lengths = [row["length"] for row in next(iter(pairs.values()))[0]["lengths"]]
    rows = [["", *map(short, lengths)]]
    for task, (before, after) in pairs.items():
        cells = zip(before["lengths"], after["lengths"], strict=True)
        rows.append([_title(task), *(f"{_cell(a)} → {_cell(b)}" for a, b in cells)])
    return rows


def _cell(row: dict[str, Any]) -> str:
    if "hit" not in row:
        return f"{row['perplexity']:.4g}"
    return percent(row["hit"])


def _note(pairs: dict[str, list[dict[str, Any]]]) -> str:
    counts = {
        row["cases"]
        for task, two in pairs.items()
        if task != "perplexity"
        for row in two[0]["lengths"]
    }
    cases = ""
    if counts:
        number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        cases = f"; {number} cases per cell, so that small differences may be chance"
    documents = ""
    if "perplexity" in pairs:
        documents = f" Perplexity of {pairs['perplexity'][0]['lengths'][0]['documents']} documents."
    return f"Before → after, by context length in tokens{cases}.{documents}"


def _title(task: str) -> str:
    return _TITLES.get(task, f"{task}, % right")


def _add_to_card(card: Path, text: str) -> None:
    """Put the table at the end of the model card, in place of one of an earlier run."""
    content = card.read_text("utf-8").split(f"\n{_HEADING}\n")[0].rstrip()
    write_whole(card, f"{content}\n\n{_HEADING}\n\n{text}\n".encode())
