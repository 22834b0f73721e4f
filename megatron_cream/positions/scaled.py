# SPDX-License-Identifier: Apache-2.0
"""A scale a sample, and positions that reach as far as it says: what CLEX trains on.

A sample of scale t is placed by any other strategy with t * N0 as its target window, at t = 1 and
N = N0 plainly. Published, positions are RandPos over N * t, divided by N / N0 where the window was
that much shorter: fractions of a token that no sequence has, the last of which may come before the
one before it. Here they are whole, and scales that N tokens do not fit in are not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions import make_strategy, philox
from megatron_cream.positions.layout import SampleLayout, Strategy

_SCALE_STREAM = 2  # keeps the scale apart from the layout of the same sample, and from shuffling


@dataclass(frozen=True)
class Scaled(Strategy):
    """A strategy drawn anew for each sample's scale, uniformly among ``scales``.

    Attributes:
        original_length: N0, the window in tokens that a scale of 1 stands for.
        scales: those that are drawn, increasing.
        inner: name of the strategy that places the sample.
        options: its options, as (name, value).
    """

    original_length: int = 1
    scales: tuple[float, ...] = (1.0,)
    inner: str = "full"
    options: tuple[tuple[str, Any], ...] = ()

    name = "scaled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales:
            raise UserError(
                f"target_length (--target-length) is {self.target_length}: no scale up to it holds "
                f"{self.train_length} tokens (--seq-length)"
            )
        self.strategies  # noqa: B018  options that one of them cannot serve are errors here

    @cached_property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategy of each scale."""
        return tuple(
            make_strategy(self.inner, self.train_length, self.reach(t), **dict(self.options))
            for t in self.scales
        )

    def reach(self, scale: float) -> int:
        """Return the target window in tokens at a scale."""
        return max(self.train_length, min(round(scale * self.original_length), self.target_length))

    def scale(self, seed: int, index: int) -> float:
        """Return the scale of sample ``index``; pure, as its layout."""
        return self.scales[self._drawn(seed, index)]

    def _drawn(self, seed: int, index: int) -> int:
        if len(self.scales) == 1:
            return 0
        return int(philox.generator(seed, index, _SCALE_STREAM).integers(len(self.scales)))

    @property
    def content_length(self) -> int:
        return self.strategies[-1].content_length

    @property
    def shortest_length(self) -> int:
        return max(strategy.shortest_length for strategy in self.strategies)

    def layout(self, seed: int, index: int) -> SampleLayout:
        return self.strategies[self._drawn(seed, index)].layout(seed, index)
