# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream positions``: reports and draws where a strategy puts its tokens."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.positions import (
    STRATEGIES,
    Coverage,
    SampleLayout,
    Strategy,
    coverage,
    make_strategy,
)
from megatron_cream.positions.coverage import describe, range_name, share_text
from megatron_cream.positions.mixtures import PlainShare
from megatron_cream.positions.strategy import ChunkLayout, strategy_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """
    megatron-cream positions --strategy cream --train-length 4096 --target-length 262144

Prints the report and writes a picture.
"""

MOST = {"--train-length": 2**22, "--target-length": 2**26, "--samples": 10**7}

INK, MUTED, HOLE = "#22303c", "#6b7785", "#c0392b"
CHUNKS = ("#3b6ea5", "#e39b3b", "#4f9d69", "#8d6bb0", "#c46a7d", "#5aa7b5")
BINS = 1024  # columns of the distance panel; about one a pixel
ROW_BINS = 512  # columns of a layout of very many pieces
MOST_BARS = 64  # a row of more chunks than these is drawn by density


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add(
        "--train-length",
        "--seq-length",
        type=int,
        required=True,
        metavar="N",
        help="tokens of a sample",
    )
    add("--target-length", type=int, required=True, metavar="T", help="window to reach")
    strategies = tuple(STRATEGIES)
    add("--strategy", "--position-strategy", choices=strategies, required=True, help="of positions")
    # Each option has the name that it has in training as well: flags can be copied from a script.
    for cls in STRATEGIES.values():
        for name, option in cls.declared().items():
            flags = (f"--{name.replace('_', '-')}", cls.flag(name))
            add(*flags, dest=name, **option.argument())
    add("--plain-share", type=float, default=0.0, help="share of samples at plain positions")
    add("--samples", type=int, help="samples to count (default: 32000, fewer where that is slow)")
    add("--seed", "--position-seed", type=int, default=1234, help="of positions (default: 1234)")
    add("--layouts", type=int, default=24, help="samples to draw (default: 24)")
    add("--output", type=Path, metavar="FILE", help="default: positions-STRATEGY.png")


def _validate(args: argparse.Namespace) -> None:
    for flag, most in MOST.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value > most:
            raise UserError(f"{flag} is {value}: it must be at most {most}")
    if not 1 <= args.layouts <= 200:
        raise UserError(
            f"--layouts is {args.layouts}: it must be from 1 to 200 rows of the picture"
        )


def default_samples(strategy: Strategy) -> int:
    """Return a number of samples that ``coverage`` counts in seconds: 32000, a run of 1000 x 32.

    Fewer where a sample has many pieces, because each pair of pieces is counted, and far fewer
    where it has as many pieces as tokens (RandPos), because then a sample costs O(T log T).
    """
    runs = strategy.layout(seed=0, index=0).runs()
    if runs is None:
        return min(4096, max(64, 2**25 // strategy.target_length))
    pairs = len(runs) * (len(runs) + 1) // 2
    return min(32_000, max(256, 1_000_000 // pairs))


def _strategy(args: argparse.Namespace, given: dict[str, Any]) -> Strategy:
    if not args.plain_share:
        return make_strategy(args.strategy, args.train_length, args.target_length, **given)
    return PlainShare(
        args.train_length,
        args.target_length,
        plain_share=args.plain_share,
        inner=args.strategy,
        options=tuple(given.items()),
    )


def run(args: argparse.Namespace) -> None:
    """Print the report, write the picture and print its path."""
    _validate(args)
    output = args.output or Path(f"positions-{args.strategy}.png")
    validate_picture_path(output)
    names = [name for cls in STRATEGIES.values() for name in cls.declared()]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    own = strategy_class(args.strategy)
    strategy = _strategy(args, own.recommended(args.train_length, args.target_length, given))
    samples = default_samples(strategy) if args.samples is None else args.samples
    result = coverage(strategy, samples, args.seed)
    print(describe(strategy, result))
    layouts = [strategy.layout(args.seed, index) for index in range(args.layouts)]
    draw(strategy, result, layouts, output)
    print(f"picture: {output}")


def has_matplotlib() -> bool:
    """Say whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, before any long work."""
    if not has_matplotlib():
        raise MissingPackageError(
            "a picture needs matplotlib: pip install -e '.[plot]' in a checkout", name="matplotlib"
        )


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
