# SPDX-License-Identifier: Apache-2.0
"""Writes what a model could do before and can do after: report.html, and the model card's table."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_cream
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
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1><p>{recipe}</p>
<h2>Before and after</h2>{table}<p>{note}</p>{pictures}
<h2>Settings</h2><pre>{settings}</pre><p>megatron_cream {version}</p>
</body></html>
"""


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
    page = _PAGE.format(
        title=html.escape(f"{output.name}: {recipe.window} to {recipe.target} tokens"),
        recipe=html.escape(recipe.describe()),
        table=_html_table(rows),
        note=html.escape(_note(pairs)),
        pictures="".join(_picture(task, results) for task, results in pairs.items()),
        settings=html.escape(json.dumps(vars(settings), indent=2)),
        version=megatron_cream.__version__,
    )
    report = output / "report.html"
    write_whole(report, page.encode())
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


def _html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _title(task: str) -> str:
    return _TITLES.get(task, f"{task}, % right")


def _picture(task: str, results: list[dict[str, Any]]) -> str:
    if not has_matplotlib():
        return ""
    from megatron_cream.evaluation.pictures import picture

    image = io.BytesIO()
    picture(results).savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    title = html.escape(_title(task))
    return f'<h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{data}">'


def _add_to_card(card: Path, text: str) -> None:
    """Put the table at the end of the model card, in place of one of an earlier run."""
    content = card.read_text("utf-8").split(f"\n{_HEADING}\n")[0].rstrip()
    write_whole(card, f"{content}\n\n{_HEADING}\n\n{text}\n".encode())
