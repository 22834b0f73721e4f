# SPDX-License-Identifier: Apache-2.0
"""Draws RULER's scores: averages by length with the threshold, and a map of task and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_cream.evaluation.charts import (
    MUTED,
    NORMAL,
    SMALL,
    ChartLine,
    draw_lines,
    heat_map,
    length_axis,
    mark_window,
    name_lines,
    style,
)
from megatron_cream.evaluation.results import Result, lengths_of, ruler_score, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LENGTH = "length of a case (tokens)"


def ruler_size(results: Sequence[Result]) -> tuple[float, float]:
    """Return width and height in inches, with room for the columns and rows of a map."""
    if len(results) > 1:
        return 5, 3.3
    lengths, tasks = (len(results[0][name]) for name in ("lengths", "ruler_tasks"))
    return 7.2 + 0.4 * lengths, 2.6 + 0.15 * tasks


def draw_ruler(figure: Figure, results: Sequence[Result]) -> None:
    """Draw the averages of all runs; beside them, of a single run, every task's scores."""
    if len(results) > 1:
        _averages(figure.subplots(), results)
        return
    left, right = figure.subplots(1, 2)
    _averages(left, results)
    _scores(right, results[0])


def _averages(axes: Axes, results: Sequence[Result]) -> None:
    names = [result["name"] if len(results) > 1 else "" for result in results]
    lines = [
        ChartLine(name, [row["length"] for row in rows], [row["average"] for row in rows])
        for name, rows in zip(names, (result["lengths"] for result in results), strict=True)
    ]
    draw_lines(axes, lines)
    tasks = len(results[0]["ruler_tasks"])
    style(axes, _LENGTH, f"average score of {tasks} task{'s' if tasks > 1 else ''}")
    axes.set_ylim(-3, 103)
    length_axis(axes, results)
    for threshold in sorted({result["threshold"] for result in results}):
        axes.axhline(threshold, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"{threshold:g}", (0, threshold), xycoords=("axes fraction", "data"), xytext=(2, 2),
            textcoords="offset points", va="bottom", fontsize=SMALL, color=MUTED,
        )  # fmt: skip
    name_lines(axes, lines)


def _scores(axes: Axes, result: Result) -> None:
    rows, lengths = result["lengths"], lengths_of([result])
    shares = [[ruler_score(row, task) / 100 for row in rows] for task in result["ruler_tasks"]]
    shares.append([row["average"] / 100 for row in rows])
    names = [*result["ruler_tasks"], "average"]
    heat_map(axes, np.array(shares), list(map(short, lengths)), names)
    axes.axhline(len(names) - 1, color=MUTED, linewidth=1.2)
    axes.set_xlabel(_LENGTH, fontsize=NORMAL, color=MUTED)
    mark_window(axes, lengths, result["window"])
