# SPDX-License-Identifier: Apache-2.0
"""Writes what a model could do before and can do after: report.html, and the model card's table."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import Any

import megatron_cream
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results import markdown, short
from megatron_cream.evaluation.results_page import (
    folded,
    html_picture,
    html_settings,
    html_table,
    make_page,
    paragraph,
)
from megatron_cream.evaluation.store import write_whole
from megatron_cream.extend.commands import Commands
from megatron_cream.extend.recipe import ExtendSettings, Recipe
from megatron_cream.extend.steps import read_seconds
from megatron_cream.positions.plots import has_matplotlib

_HEADING = "## Before and after"
_TITLES = {
    "perplexity": "Perplexity of held-out documents",
    "passkey": "Passkey: five digits in a repeated phrase, % found",
    "needle": "Needle: a sentence in prose, % found",
    "longchat-lines": "The number of one of many lines, % found",
    "niah-multikey": "The number of one of several keys in prose, % found",
}


def write_report(settings: ExtendSettings, recipe: Recipe, plan: Commands) -> tuple[Path, str]:
    """Write OUTPUT/report.html, and the same table into OUTPUT/README.md.

    Returns the report's file, and the table as Markdown.

    Raises:
        FileNotFoundError, UserError: scores that are missing or damaged.
    """
    pairs = {task: _read_pair(plan.scores, task) for task in plan.tasks}
    rows = _rows(pairs)
    output = Path(settings.output)
    pictures = [
        f"<h3>{_title(task)}</h3>{html_picture(results, _title(task))}"
        for task, results in pairs.items()
        if has_matplotlib()
    ]
    body = [
        *(paragraph(recipe.describe()), "<h2>Before and after</h2>", html_table(rows)),
        *(paragraph(_note(pairs)), *pictures, "<h2>Steps</h2>"),
        *(_steps(plan), "<h2>Settings</h2>", html_settings(_given(settings))),
        paragraph(f"megatron_cream {megatron_cream.__version__}"),
    ]
    report = output / "report.html"
    title = f"{plan.source.name}: {short(recipe.window)} to {short(recipe.target)} tokens"
    write_whole(report, make_page(title, "".join(body)).encode())
    table = markdown(rows)
    _add_to_card(output / "README.md", f"{recipe.describe()}\n\n{table}\n\n{_note(pairs)}")
    return report, table


def _steps(plan: Commands) -> str:
    """Return HTML of what each step took, and of the commands."""
    seconds, steps = read_seconds(plan.work / "logs"), plan.all_steps()
    times = [[s.name, f"{seconds[s.name]:.0f}"] for s in steps if s.name in seconds]
    commands = "\n\n".join(f"# {step.name}\n{step.line()}" for step in steps)
    table = html_table([["step", "seconds"], *times])
    return table + folded("Commands", f"<pre>{html.escape(commands)}</pre>")


def _given(settings: ExtendSettings) -> dict[str, Any]:
    """Return the settings that are not as they are by default."""
    fields = dataclasses.fields(settings)
    values = {one.name: getattr(settings, one.name) for one in fields}
    return {one.name: values[one.name] for one in fields if values[one.name] != one.default}


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
    return f"{100 * row['hit']:.0f}"  # the title says %


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
        count = pairs["perplexity"][0]["lengths"][0]["documents"]
        documents = f" Perplexity of {count} document{'s' * (count > 1)}."
    return f"Before → after, by context length in tokens{cases}.{documents}"


def _title(task: str) -> str:
    return _TITLES.get(task, f"{task}, % right")


def _add_to_card(card: Path, text: str) -> None:
    """Put the table at the end of the model card, in place of one of an earlier run."""
    content = card.read_text("utf-8").split(f"\n{_HEADING}\n")[0].rstrip()
    write_whole(card, f"{content}\n\n{_HEADING}\n\n{text}\n".encode())
