# SPDX-License-Identifier: Apache-2.0
"""Draws what plain positions, PoSE and CREAM find by length, with the same data and steps.

python examples/study/picture.py docs/images/study.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
LENGTHS = ("4096", "8192", "16384", "32768")
PANELS = {
    "niah-multikey": "one of several keys",
    "kv-retrieval": "one key-value pair of a list",
    "longchat-lines": "one line of a list",
}
WAYS = {  # a variant's name: its name in the picture, its colour
    "cream-questions-64-retrieval-0.30": ("CREAM", "#0060a8"),
    "pose-questions-64-retrieval-0.30": ("PoSE", "#c8561b"),
    "plain-questions-64-retrieval-0.30": ("plain positions", "#7a7a7a"),
}


def main(output: str) -> None:
    """Write the picture: a panel per task, a line per way, a dot per training seed."""
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 3.6), sharey=True)
    for axes, (task, title) in zip(panels, PANELS.items(), strict=True):
        for way, (name, colour) in WAYS.items():
            _draw(axes, [_hits(tasks, task) for tasks in _runs(way)], name, colour)
        before = json.loads((RESULTS / "before.json").read_text("utf-8"))["tasks"]
        axes.plot(_hits(before, task), ":", color="black", label="before")
        axes.axvline(1, color="#d0d0d0", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(range(len(LENGTHS)), [f"{int(n) // 1024}K" for n in LENGTHS])
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("found, % of 100 cases")
    panels[-1].text(1.05, 68, "window of the\nmodel before", fontsize=8, color="#707070")
    panels[-1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def _runs(name: str) -> Iterator[dict[str, Any]]:
    """Yield the tasks of each training seed of a variant."""
    for path in sorted(RESULTS.glob(f"{name}-seed*.json")):
        yield json.loads(path.read_text("utf-8"))["tasks"]


def _hits(tasks: dict[str, Any], task: str) -> list[float]:
    return [tasks[task][length]["hit"] for length in LENGTHS]


def _draw(axes: Axes, runs: list[list[float]], name: str, colour: str) -> None:
    for run in runs:
        axes.plot(run, "o", color=colour, markersize=4, alpha=0.5)
    means = [sum(found) / len(found) for found in zip(*runs, strict=True)]
    axes.plot(means, "-", color=colour, label=name)


if __name__ == "__main__":
    main(sys.argv[1])
