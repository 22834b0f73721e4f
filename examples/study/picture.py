# SPDX-License-Identifier: Apache-2.0
"""Draws what scatter, CREAM, PoSE and plain positions find by length, with the same data and steps.

python examples/study/picture.py docs/images/study.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from results import read_runs

RESULTS = Path(__file__).parent / "results"
LENGTHS = ("4096", "8192", "16384", "32768")
PANELS = {
    "niah-multikey": "one of several keys",
    "kv-retrieval": "one key-value pair of a list",
    "longchat-lines": "one line of a list",
}
WAYS = {  # a variant's name: its name in the picture, its colour
    "scatter-answers-only-0.50": ("scatter", "#2a8a4a"),
    "cream-answers-only-0.50": ("CREAM", "#0060a8"),
    "pose-answers-only-0.50": ("PoSE", "#c8561b"),
    "plain-answers-only-0.50": ("plain positions", "#7a7a7a"),
}


def main(output: str) -> None:
    """Write the picture: a panel per task, a line per way, a dot per training seed."""
    runs = read_runs(RESULTS, [*WAYS, "before"])
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 3.9), sharey=True)
    for axes, (task, title) in zip(panels, PANELS.items(), strict=True):
        for way, (name, colour) in WAYS.items():
            _draw(axes, [_hits(run, task) for run in runs[way].values()], name, colour)
        (before,) = runs["before"].values()
        axes.plot(_hits(before, task), ":", color="black", label="before")
        axes.axvline(1, color="#d0d0d0", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(range(len(LENGTHS)), [f"{int(n) // 1024}K" for n in LENGTHS])
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("found, % of 100 cases")
    panels[0].text(1.05, 50, "window of the\nmodel before", fontsize=8, color="#707070")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="lower center", ncols=len(names[0]), frameon=False, fontsize=9)
    figure.savefig(output, dpi=130)


def _hits(run: dict[str, Any], task: str) -> list[float]:
    return [run["tasks"][task][length]["hit"] for length in LENGTHS]


def _draw(axes: Axes, runs: list[list[float]], name: str, colour: str) -> None:
    for run in runs:
        axes.plot(run, "o", color=colour, markersize=4, alpha=0.5)
    means = [sum(found) / len(found) for found in zip(*runs, strict=True)]
    axes.plot(means, "-", color=colour, label=name)


if __name__ == "__main__":
    main(sys.argv[1])
