# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: perplexity by context length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Colour, marker, line width, marker size. PoSE is drawn broad, for CREAM may lie on it.
STYLES = {
    "base": ("#8c8c8c", "o", 2, 6),
    "base, interpolated": ("#c9a227", "s", 2, 6),
    "PoSE": ("#9cc3f0", "o", 6, 12),
    "CREAM": ("#c8385a", "D", 2, 5),
}


def draw(table: dict[str, dict[int, float]], train_length: int, path: Path) -> None:
    """Draw one line a model; both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=160)
    for name, row in table.items():
        color, marker, width, size = STYLES[name]
        axes.plot(
            row.keys(),
            row.values(),
            color=color,
            marker=marker,
            label=name,
            linewidth=width,
            markersize=size,
        )
    lengths = list(next(iter(table.values())))
    axes.axvline(train_length, color="#444444", linewidth=1, linestyle=":")
    axes.annotate(
        f"every model was trained at {train_length} tokens",
        (train_length, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("perplexity on held-out documents")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
