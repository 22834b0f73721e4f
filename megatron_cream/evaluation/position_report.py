# SPDX-License-Identifier: Apache-2.0
"""Say in words which relative distances a strategy trains, and how often."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_cream.positions import Coverage, Strategy

HOLES_SHOWN = 8


def describe(strategy: Strategy, result: Coverage) -> str:
    """Return the report of ``coverage`` as lines of text; distances and positions in tokens."""
    train, target = strategy.train_length, strategy.target_length
    pairs, far = result.pair_counts[1:], result.pair_counts[train:]
    lines = [
        f"{strategy.name}: N = {train}, T = {target}, factor {strategy.factor:g}, "
        f"{result.samples} samples",
        f"distances covered: {percent(result.covered)} of [1, {target})",
        *_hole_lines(result),
        "samples that contain a distance, on average:",
        *(f"  {name:<20}{percent(share)}" for name, share in _seen(train, result)),
        f"pairs at distance >= N: {percent(far.sum() / max(pairs.sum(), 1))}",
    ]
    if result.middle_thirds is not None:
        lines.append(f"middle chunks' centres:  {_thirds(result.middle_thirds)}")
    lines.append(f"trained positions:       {_thirds(result.token_thirds)}")
    return "\n".join(lines)


def _thirds(shares: tuple[float, float, float]) -> str:
    names = ("first", "middle", "last")
    return ", ".join(f"{n} third {percent(s)}" for n, s in zip(names, shares, strict=True))


def _hole_lines(result: Coverage) -> Iterator[str]:
    holes = sorted(result.holes, key=lambda hole: hole[0] - hole[1])
    if not holes:
        yield "holes: none"
        return
    yield f"holes: {len(holes)}, distances that no sample contains"
    for low, high in sorted(holes[:HOLES_SHOWN]):
        size = high - low + 1
        share = size / (result.target_length - 1)
        yield f"  {range_name(low, high):<20}{size} distance{'s'[: size > 1]}, {percent(share)}"
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


def percent(share: float) -> str:
    """Write a share with three digits, and never 0 or 100 % for what is not quite that."""
    if 0.999 < share < 1:
        return f"{100 * share:.5f} %"
    return f"{100 * share:.3g} %"


def range_name(low: int, high: int) -> str:
    """Write a range of distances, both ends inclusive."""
    return f"{low}..{high}" if high > low else f"{low}"
