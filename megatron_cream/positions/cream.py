# SPDX-License-Identifier: Apache-2.0
"""CREAM: continuity-relativity indexing with a Gaussian middle (arXiv:2406.07138).

A sample has three chunks. The head stands at the start of the target window and the tail at its
end; the middle chunk ends at a random place that a Gaussian pulls to the middle of the window. A
coin per sample sets the length h of head and tail: N/3 puts the chunks far apart and trains long
relative distances (relativity), 4f keeps the text nearly whole (continuity).

Where this departs from the published code, and why:

1. The head/tail coin is flipped per sample. Published, it is flipped once per batch of 3000 rows,
   so that a run of 10,000 rows has four flips and its share of the two settings has a standard
   deviation of 0.25.
2. Content never overlaps the tail. Published, the middle is re-anchored only when it runs past
   the end of the document, not when it runs into the tail: up to a tenth of the samples then
   contain the first tail tokens twice, an answer to copy inside the loss.
3. Bounds are exact integers for any real factor, odd N and odd half-window counts. Published, the
   factor is floored (positions never reach beyond floor(f) * N) and odd N raises an error or draws
   from a float range.

The draw of the middle itself is the published one by default, down to the clamp and the floor,
except that its probabilities are the exact ones instead of those of a 1000-point table.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from numbers import Integral
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions import philox
from megatron_cream.positions.strategy import ChunkLayout, Span, Strategy, option


@dataclass(frozen=True)
class CreamLayout(ChunkLayout):
    """Head, middle and tail; see the module for which text each one reads."""

    def _spans(self, document_length: int) -> list[Span]:
        (_, head), (start, middle), _ = self.chunks
        tail_offset = document_length - head
        # Text index equals position index as long as the document is long enough to have it free;
        # otherwise the middle is the text just before the tail. N <= document_length makes
        # tail_offset - middle >= head, so that it cannot reach back into the head.
        middle_offset = min(start, tail_offset - middle)
        return [(0, head), (middle_offset, middle), (tail_offset, head)]


SIGMA, SIGMA_RELATIVE = 3.0, 0.375
"""The published width in half windows, and the relative one that equals it at factor 8."""

WIDE = 8
"""T / N above which the published width leaves distances out; docs/positions.md."""


@dataclass(frozen=True)
class Cream(Strategy, name="cream"):
    """CREAM positions.

    Attributes:
        sigma: width of the Gaussian in half windows (N / 2), whatever the factor. As published.
        sigma_relative: width as a multiple of the factor f instead; 3/8 equals the published
            width at f = 8 and keeps that shape at every f. Takes the place of ``sigma``.
        gaussian: ``clamped`` as published (the mass outside the window piles up at its two ends,
            and the draw is rounded down, so that the mean lies half a half window early) or
            ``truncated`` (renormalised inside the window and rounded to nearest, so that the
            mean is the middle exactly).
        head_lengths: lengths of head and tail among which each sample draws, in tokens. Default
            (N // 3, floor(4 f)).
    """

    sigma: float = option(
        "width of the Gaussian in half windows",
        default=SIGMA,
        default_help=f"{SIGMA:g} up to T = {WIDE} N",
    )
    sigma_relative: float | None = option(
        "its width as a multiple of T / N instead",
        default_help=f"{SIGMA_RELATIVE} above that",
    )
    gaussian: str = option(
        "what becomes of draws outside the window",
        default="clamped",
        type=str,
        choices=("clamped", "truncated"),
    )
    head_lengths: tuple[int, ...] | None = option(
        "lengths of head and tail in tokens, of which each sample draws one",
        type=int,
        many=True,
        default_help="N // 3 and 4 T / N",
    )

    @classmethod
    def recommended(
        cls, train_length: int, target_length: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Take the published width, and above ``WIDE`` times N the relative one."""
        if given.keys() & {"sigma", "sigma_relative"}:
            return given
        far = target_length > WIDE * train_length
        return given | ({"sigma_relative": SIGMA_RELATIVE} if far else {"sigma": SIGMA})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_lengths is not None:
            heads = (int(h) if isinstance(h, Integral) else h for h in self.head_lengths)
            object.__setattr__(self, "head_lengths", tuple(heads))
        for head in self.heads:
            self._check_head(head)

    def _check_head(self, head: int) -> None:
        fits = isinstance(head, int) and head >= 1 and 2 * head < self.train_length
        if not fits:
            largest = (self.train_length - 1) // 2
            source = "N // 3 or 4 * factor" if self.head_lengths is None else "as given"
            needs = f"from 1 to {largest}" if largest >= 1 else "at least 1, and N at least 3"
            raise UserError(
                f"head length {head} ({source}; head_lengths, --cream-head-lengths) does not fit: "
                f"head, tail and at least one token between them share train_length (--seq-length)"
                f" = {self.train_length} tokens, so it must be {needs}"
            )

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Head lengths among which the coin chooses, in tokens."""
        if self.head_lengths is not None:
            if not self.head_lengths:
                raise UserError(
                    "head_lengths (--cream-head-lengths) is empty: it must hold at least one length"
                )
            return self.head_lengths
        return (self.train_length // 3, 4 * self.target_length // self.train_length)

    @property
    def shortest_length(self) -> int:
        if self.head_lengths is not None:
            return 2 * max(self.head_lengths) + 1
        # Two heads of floor(4 T / n) and a token between them: n * n is about 8 T.
        length = max(3, math.isqrt(8 * self.target_length) - 4)
        while 2 * (4 * self.target_length // length) >= length:
            length += 1
        return length

    @property
    def max_half_windows(self) -> int:
        """Largest number r of half windows the middle chunk may lie in: floor(2 f)."""
        return 2 * self.target_length // self.train_length

    @cached_property
    def half_window_probabilities(self) -> list[float]:
        """P(r) for r = 2 .. floor(2 f), the window r N / 2 in which the middle chunk ends."""
        last = self.max_half_windows
        mean = 1.0 + self.factor
        sigma = self.sigma if self.sigma_relative is None else self.sigma_relative * self.factor

        def cdf(x: float) -> float:
            return 0.5 * math.erfc((mean - x) / (sigma * math.sqrt(2.0)))

        if self.gaussian == "clamped":
            edges = [0.0, *(cdf(r) for r in range(3, last + 1)), 1.0]
        else:
            edges = [cdf(r - 0.5) for r in range(2, last + 2)]
        total = edges[-1] - edges[0]
        if total <= 0.0:
            raise UserError(f"sigma is {sigma}: too narrow to draw from at factor {self.factor}")
        return [(b - a) / total for a, b in zip(edges, edges[1:], strict=False)]

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(accumulate(self.half_window_probabilities))[:-1]

    def middle_end_range(self, head: int, half_windows: int) -> tuple[int, int]:
        """First and last position, inclusive, at which the middle chunk may end."""
        middle = self.train_length - 2 * head
        low = head + (middle - 1) * half_windows // 2
        if half_windows == self.max_half_windows:
            # The last window reaches the tail also where 2 f is not a whole number.
            return low, self.target_length - head - 1
        return low, self.train_length * half_windows // 2 - head - 1

    @cached_property
    def _ends(self) -> list[list[tuple[int, int]]]:
        """(first end, number of ends) of the middle chunk by head setting and r - 2."""
        table = []
        for head in self.heads:
            ranges = [self.middle_end_range(head, r) for r in range(2, self.max_half_windows + 1)]
            table.append([(low, high - low + 1) for low, high in ranges])
        return table

    def place(self, head: int, middle_end: int) -> CreamLayout:
        """Return the layout for given draws: head length and last position of the middle chunk."""
        middle = self.train_length - 2 * head
        chunks = ((0, head), (middle_end - middle + 1, middle), (self.target_length - head, head))
        return CreamLayout(self.train_length, self.target_length, chunks)

    def layout(self, seed: int, index: int) -> CreamLayout:
        coin, gauss, end, _ = philox.words(seed, index, 4)
        setting = philox.below(coin, len(self.heads))
        window = bisect_right(self._cumulative, philox.unit(gauss))
        first, count = self._ends[setting][window]
        return self.place(self.heads[setting], first + philox.below(end, count))
