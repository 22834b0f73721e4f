# SPDX-License-Identifier: Apache-2.0
"""Counts which relative distances a strategy ever trains, and how often; says it in words.

Attention sees only the distance between query and key. A distance that no sample contains keeps
whatever the interpolated model makes of it, however long the run, so holes are worth finding
before the run rather than after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.positions.strategy import ChunkLayout, SampleLayout, Span, Strategy

HOLES_SHOWN = 8  # in words


@dataclass(frozen=True)
class Coverage:
    """Result of ``coverage``.

    Attributes:
        samples: number of layouts looked at.
        sample_counts: int64 ``[T]``; entry d is the number of samples that contain at least one
            pair of tokens at distance d. Entry 0 is the number of samples.
        pair_counts: float64 ``[T]``; entry d is the number of such pairs over all samples.
        middle_centres: float64, centre position of every chunk that is neither first nor last.
        token_thirds: share of the trained positions in each third of the target window.
    """

    samples: int
    sample_counts: np.ndarray = field(repr=False)
    pair_counts: np.ndarray = field(repr=False)
    middle_centres: np.ndarray = field(repr=False)
    token_thirds: tuple[float, float, float]

    @property
    def target_length(self) -> int:
        """T in tokens."""
        return len(self.sample_counts)

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Distances in ``[1, T)`` that no sample contains, as inclusive (first, last) ranges."""
        missing = np.concatenate(([False], self.sample_counts[1:] == 0, [False]))
        edges = np.flatnonzero(missing[1:] != missing[:-1])
        return [(int(a) + 1, int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def covered(self) -> float:
        """Share of the distances in ``[1, T)`` that at least one sample contains."""
        return _covered(self.sample_counts)

    @property
    def middle_thirds(self) -> tuple[float, float, float] | None:
        """Share of middle-chunk centres in each third of the window; None without such chunks."""
        if not len(self.middle_centres):
            return None
        thirds = np.minimum((3 * self.middle_centres / self.target_length).astype(int), 2)
        return _shares(np.bincount(thirds, minlength=3))


def coverage(strategy: Strategy, samples: int, seed: int = 1234) -> Coverage:
    """Count the relative distances in the first ``samples`` layouts of a run.

    Cost is O(T) memory and, for strategies of a few chunks, O(samples + T) time; RandPos takes
    O(samples * T log T).

    Args:
        strategy: what draws the layouts.
        samples: how many.
        seed: of the positions (--position-seed).

    Returns:
        Counts per distance, int64 and float64 ``[T]``, and what follows from them: ``covered``,
        ``holes`` in tokens, ``token_thirds``.

    Raises:
        UserError: ``samples`` is below 1.
    """
    if samples < 1:
        raise UserError(f"samples (--samples) is {samples}: it must be at least 1")
    tally = Tally(strategy.target_length)
    for index in range(samples):
        tally.add(strategy.layout(seed, index))
    return tally.result(samples)


class Tally:
    """Sums over layouts, as difference arrays so that a chunk costs O(1) and not O(length).

    ``add`` layouts, in any number; read ``covered`` in between, or ``result`` at the end.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length
        self.presence: list[Span] = []
        self.first_difference = np.zeros(target_length + 1, dtype=np.int64)
        self.second_difference = np.zeros(2 * target_length + 2, dtype=np.float64)
        self.dense_counts = np.zeros(target_length, dtype=np.int64)
        self.dense_pairs = np.zeros(target_length, dtype=np.float64)
        self.centres: list[float] = []
        self.thirds = np.zeros(3)
        self.third_edges = [-(-i * target_length // 3) for i in range(4)]

    def add(self, layout: SampleLayout) -> None:
        runs = layout.runs()
        if runs is None:
            self._add_dense(layout.position_ids)
        else:
            self._add_runs(runs)
        # Chunks and not runs: a middle that touches the head is a middle all the same.
        if isinstance(layout, ChunkLayout):
            self.centres += [start + (length - 1) / 2 for start, length in layout.chunks[1:-1]]

    @property
    def covered(self) -> float:
        """Share of the distances in ``[1, T)`` that a layout added so far contains."""
        return _covered(self._sample_counts())

    @property
    def token_thirds(self) -> tuple[float, float, float]:
        """Share of the positions added so far in each third of the target window."""
        return _shares(self.thirds)

    def _sample_counts(self) -> np.ndarray:
        return np.cumsum(self.first_difference)[:-1] + self.dense_counts

    def _add_runs(self, runs: list[Span]) -> None:
        distances = [(0, length - 1) for _, length in runs]
        for start, length in runs:
            self._add_pairs_within(length)
            self._add_to_thirds(start, length)
        for (a, a_length), (b, b_length) in combinations(runs, 2):
            low = b - a - a_length + 1
            distances.append((low, b - a + b_length - 1))
            self._add_pairs_between(low, a_length, b_length)
        for low, high in _union(distances):
            self.first_difference[low] += 1
            self.first_difference[high + 1] -= 1

    def _add_pairs_within(self, length: int) -> None:
        # length - d pairs at distance d: the falling half of a triangle, set by its first value
        # and two slopes.
        second = self.second_difference
        second[0] += length
        second[1] += -length - 1
        second[length + 1] += 1

    def _add_pairs_between(self, low: int, a: int, b: int) -> None:
        # Two boxes convolved: a trapezoid, whose second difference is four points.
        second = self.second_difference
        second[low] += 1
        second[low + a] -= 1
        second[low + b] -= 1
        second[low + a + b] += 1

    def _add_to_thirds(self, start: int, length: int) -> None:
        edges = self.third_edges
        for i in range(3):
            self.thirds[i] += max(0, min(start + length, edges[i + 1]) - max(start, edges[i]))

    def _add_dense(self, position_ids: np.ndarray) -> None:
        present = np.zeros(2 * self.target_length)
        present[position_ids] = 1.0
        spectrum = np.fft.rfft(present)
        pairs = np.rint(np.fft.irfft(spectrum * spectrum.conj())[: self.target_length])
        self.dense_pairs += pairs
        self.dense_counts += pairs > 0
        thirds = np.minimum(3 * position_ids // self.target_length, 2)
        self.thirds += np.bincount(thirds, minlength=3)

    def result(self, samples: int) -> Coverage:
        chunked_pairs = np.cumsum(np.cumsum(self.second_difference))[: self.target_length]
        return Coverage(
            samples=samples,
            sample_counts=self._sample_counts(),
            pair_counts=chunked_pairs + self.dense_pairs,
            middle_centres=np.array(self.centres),
            token_thirds=self.token_thirds,
        )


def _covered(sample_counts: np.ndarray) -> float:
    return float(np.mean(sample_counts[1:] > 0)) if len(sample_counts) > 1 else 1.0


def _shares(thirds: np.ndarray) -> tuple[float, float, float]:
    first, middle, last = map(float, thirds / thirds.sum())
    return first, middle, last


def _union(intervals: list[Span]) -> list[Span]:
    """Merge overlapping inclusive intervals, so that a sample counts once for each distance."""
    merged: list[Span] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


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
