# SPDX-License-Identifier: Apache-2.0
"""Reports and draws where a strategy puts its tokens and which relative distances it trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.positions import Coverage, SampleLayout, Strategy
from megatron_cream.positions.layout import ChunkLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, HOLE = "#22303c", "#6b7785", "#c0392b"
CHUNKS = ("#3b6ea5", "#e39b3b", "#4f9d69", "#8d6bb0", "#c46a7d", "#5aa7b5")
BINS = 1024  # columns of the distance panel; about one a pixel
ROW_BINS = 512  # columns of a layout of very many pieces
HOLES_SHOWN = 8  # in words
MOST_BARS = 64  # a row of more chunks than these is drawn by density


def has_matplotlib() -> bool:
    """Say whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, before any long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingPackageError(
            "a picture needs matplotlib: pip install -e '.[plot]' in a checkout", name="matplotlib"
        ) from exc


def validate_picture_path(path: Path) -> None:
    """Check where a picture is to go, before any long work.

    Raises:
        UserError: its folder is missing, or matplotlib writes no such kind of file.
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.parent.is_dir():
        raise UserError(f"--output is {path}: its folder does not exist")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise UserError(f"--output is {path}: it must end in one of .{', .'.join(known)}")


def describe(strategy: Strategy, result: Coverage) -> str:
    """Return the report of ``coverage`` as lines of text; distances and positions in tokens."""
    train, target = strategy.train_length, strategy.target_length
    pairs, far = result.pair_counts[1:], result.pair_counts[train:]
    lines = [
        f"{strategy.name}: N = {train}, T = {target}, factor {strategy.factor:g}, "
        f"{result.samples} samples",
        f"distances covered: {share_text(result.covered)} of [1, {target})",
        *_hole_lines(result),
        "samples that contain a distance, on average:",
        *(f"  {name:<20}{share_text(share)}" for name, share in _seen(train, result)),
        f"pairs at distance >= N: {share_text(far.sum() / max(pairs.sum(), 1))}",
    ]
    if result.middle_thirds is not None:
        lines.append(f"middle chunks' centres:  {_thirds(result.middle_thirds)}")
    lines.append(f"trained positions:       {_thirds(result.token_thirds)}")
    return "\n".join(lines)


def _thirds(shares: tuple[float, float, float]) -> str:
    names = ("first", "middle", "last")
    return ", ".join(f"{n} third {share_text(s)}" for n, s in zip(names, shares, strict=True))


def _hole_lines(result: Coverage) -> Iterator[str]:
    holes = sorted(result.holes, key=lambda hole: hole[0] - hole[1])
    if not holes:
        yield "holes: none"
        return
    yield f"holes: {len(holes)}, distances that no sample contains"
    for low, high in sorted(holes[:HOLES_SHOWN]):
        size = high - low + 1
        share = size / (result.target_length - 1)
        yield f"  {range_name(low, high):<20}{size} distance{'s'[: size > 1]}, {share_text(share)}"
    if len(holes) > HOLES_SHOWN:
        yield f"  and {len(holes) - HOLES_SHOWN} more, none longer"


def _seen(train: int, result: Coverage) -> Iterator[tuple[str, float]]:
    """Mean share of samples by range of distances; ranges that are empty are left out."""
    target = result.target_length
    shares = result.sample_counts / result.samples
    edges = [1, train, *(max(train, -(-i * target // 3)) for i in (1, 2)), target]
    for low, high in zip(edges, edges[1:], strict=False):
        if low < high:
            yield f"[{low}, {high})", float(shares[low:high].mean())
    if train < target:
        yield f"least, from {train} on", float(shares[train:].min())


def share_text(share: float) -> str:
    """Write a share with three digits, and never 0 or 100 % for what is not quite that."""
    if 0.999 < share < 1:
        return f"{100 * share:.5f} %"
    return f"{100 * share:.3g} %"


def range_name(low: int, high: int) -> str:
    """Write a range of distances, both ends inclusive."""
    return f"{low}..{high}" if high > low else f"{low}"


def draw(strategy: Strategy, result: Coverage, layouts: list[SampleLayout], output: Path) -> None:
    """Write a picture of ``layouts`` (some samples) and of ``result`` (many) to ``output``.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), dpi=150, layout="constrained", facecolor="white")
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.12, w_pad=0.12, hspace=0.04)
    title = (
        f"{strategy.name}: {_tokens(strategy.train_length)} trained tokens over a window of "
        f"{_tokens(strategy.target_length)}, {share_text(result.covered)} of all distances covered"
    )
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, color=INK, weight="bold")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    _draw_layouts(top, strategy, layouts)
    _draw_distances(bottom, strategy.train_length, result)
    _style_x(bottom, strategy.target_length)
    figure.savefig(output)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=MUTED, pad=8)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5ccd3")


def _tokens(count: float) -> str:
    """1024 tokens are 1K, as in the names of context windows."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count and count % size == 0:
            return f"{count / size:g}{unit}"
    return f"{count:.0f}"


def _style_x(axes: Axes, target: int) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    axes.set_xlim(0, target)
    if target % 8192 == 0:
        axes.xaxis.set_major_locator(MultipleLocator(target // 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    axes.set_xlabel("tokens: position above, relative distance below", fontsize=9.5, color=MUTED)


def _draw_layouts(axes: Axes, strategy: Strategy, layouts: list[SampleLayout]) -> None:
    of_chunks = [layout for layout in layouts if isinstance(layout, ChunkLayout)]
    few = all(len(layout.chunks) in range(1, MOST_BARS + 1) for layout in of_chunks)
    if few and len(of_chunks) == len(layouts):
        # In order of the middle or last chunk the rows draw the spread as a curve.
        of_chunks.sort(key=lambda layout: layout.chunks[len(layout.chunks) // 2][0])
        _draw_chunks(axes, strategy, of_chunks)
        note = ", sorted" if any(len(layout.chunks) > 1 for layout in of_chunks) else ""
    else:
        _draw_density(axes, strategy, layouts)
        note = ", darker where they stand closer"
    plural = "s" if len(layouts) > 1 else ""
    _style(axes, f"where the tokens of {len(layouts)} sample{plural} stand{note}")
    axes.set_ylim(len(layouts) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("samples", fontsize=9.5, color=MUTED)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", labelbottom=False)


def _draw_chunks(axes: Axes, strategy: Strategy, layouts: list[ChunkLayout]) -> None:
    from matplotlib.patches import Patch

    target = strategy.target_length
    thinnest = target / 500  # a head of 256 in 256K must not vanish
    axes.barh(range(len(layouts)), target, height=0.62, color="#f1f3f5")
    counts = [len(layout.chunks) for layout in layouts]  # plain samples among others have one
    rows, count = np.repeat(range(len(layouts)), counts), max(counts)
    starts, lengths = np.array([chunk for layout in layouts for chunk in layout.chunks]).T
    colors = [CHUNKS[i % len(CHUNKS)] for own in counts for i in range(own)]
    axes.barh(
        rows, np.maximum(lengths, thinnest), left=np.minimum(starts, target - thinnest),
        height=0.62, color=colors,
    )  # fmt: skip
    names = ["chunk 1", *map(str, range(2, min(count, len(CHUNKS)) + 1))]
    names = ["head", "middle", "tail"] if strategy.name.startswith("cream") else names
    if count > 1:
        patches = [Patch(color=c, label=n) for n, c in zip(names, CHUNKS, strict=False)]
        _legend(axes, handles=patches)


def _draw_density(axes: Axes, strategy: Strategy, layouts: list[SampleLayout]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    edges = _edges(0, strategy.target_length, ROW_BINS)
    counts = [np.histogram(layout.position_ids, edges)[0] for layout in layouts]
    rows = np.full((2 * len(layouts) - 1, len(edges) - 1), np.nan)  # gaps between the samples
    rows[::2] = counts / np.diff(edges)
    across = np.arange(len(layouts)).repeat(2) + np.tile([-0.31, 0.31], len(layouts))
    colors = LinearSegmentedColormap.from_list("density", ["#f1f3f5", CHUNKS[0]])
    axes.pcolormesh(edges, across, rows, cmap=colors, vmin=0)


def _edges(first: int, end: int, bins: int) -> np.ndarray:
    """Edges of up to ``bins`` ranges of whole numbers that fill ``[first, end)``."""
    return np.linspace(first, end, min(bins, end - first) + 1).astype(np.int64)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(CHUNKS), frameon=False, fontsize=9,
        labelcolor=MUTED, handlelength=1, handleheight=1, borderaxespad=0.1, **options,
    )  # fmt: skip


def _binned(result: Coverage) -> tuple[np.ndarray, np.ndarray]:
    """Return (centre, share of samples) of up to ``BINS`` bins of distances.

    The share is the mean over the distances that some sample contains, so that the line stops at
    a hole rather than diving into it; a bin all in a hole is NaN.
    """
    edges = _edges(1, result.target_length, BINS)
    counts = result.sample_counts
    sums = np.add.reduceat(counts, edges[:-1]) / result.samples
    seen = np.add.reduceat((counts > 0).astype(np.int64), edges[:-1])
    shares = np.where(seen > 0, sums / np.maximum(seen, 1), np.nan)
    return (edges[:-1] + edges[1:] - 1) / 2, shares


def _draw_distances(axes: Axes, train: int, result: Coverage) -> None:
    from matplotlib.ticker import FuncFormatter

    _style(axes, f"share of {result.samples} samples that contain each relative distance")
    axes.set_yscale("log")
    lowest = 1.0
    if train > 1:
        distances, shares = _binned(result)
        axes.plot(distances, shares, color=CHUNKS[0], linewidth=1.4)
        lowest = np.nanmin(shares)
    axes.set_ylim(min(lowest / 2, 0.05), 1.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(train, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), label="trained window N")
    if result.holes:
        _shade_holes(axes, result)
    _legend(axes)


def _shade_holes(axes: Axes, result: Coverage) -> None:
    holes = sorted(result.holes, key=lambda hole: hole[0] - hole[1])
    frame = axes.get_xaxis_transform()  # across in tokens, upwards from 0 to 1
    unnamed = []
    for low, high in holes:
        width, middle = (high - low + 1) / result.target_length, (low + high) / 2
        # Names stand where they fit inside; the longest of the rest is told by the legend.
        if width < 0.02:
            unnamed.append(range_name(low, high))
            continue
        turn = 0 if width > 0.0085 * len(range_name(low, high)) else 90  # of a digit's width
        axes.text(
            middle, 0.5, range_name(low, high), rotation=turn, transform=frame, ha="center",
            va="center", fontsize=9, color=HOLE,
        )  # fmt: skip
    label = f"in no sample, such as {unnamed[0]}" if unnamed else "in no sample"
    axes.broken_barh(
        [(low - 0.5, high - low + 1) for low, high in holes], (0, 1), transform=frame,
        facecolor=(HOLE, 0.14), edgecolor=(HOLE, 0.6), linewidth=0.6, label=label,
    )  # fmt: skip
