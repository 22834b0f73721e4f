# SPDX-License-Identifier: Apache-2.0
"""Mixtures of strategies: some samples at plain positions, or one scale drawn per sample.

Plain share: a model that is trained at far positions alone gets a little worse within its old
window, where most of its work is. A share of plain samples, N consecutive tokens at 0 .. N-1, keeps
it as good. Which samples are plain is a coin of (seed, index), so that every pipeline stage knows
it by itself.

Scales: the angles of an interpolation may depend on one scale t per sample, the number of original
windows N0 that it spans. A sample of scale t is placed by any other strategy with t * N0 as its
target window, at t = 1 and N = N0 plainly. Published (CLEX), positions are RandPos over N * t,
divided by N / N0 where the window was that much shorter: fractions of a token that no sequence has,
the last of which may come before the one before it. Here they are whole, and scales that N tokens
do not fit in are not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions import philox
from megatron_cream.positions.strategy import (
    ChunkLayout,
    SampleLayout,
    Span,
    Strategy,
    make_strategy,
)

# Keep coin and scale apart from the layout of the same sample, and from shuffling.
_PLAIN_STREAM, _SCALE_STREAM = 4, 2


@dataclass(frozen=True)
class PlainLayout(ChunkLayout):
    """Positions 0 .. N-1 over N consecutive tokens, anywhere in the document."""

    word: int

    def _spans(self, document_length: int) -> list[Span]:
        room = document_length - self.train_length
        return [(philox.below(self.word, room + 1), self.train_length)]


@dataclass(frozen=True)
class PlainShare(Strategy):
    """A strategy, and plain positions for a share of the samples.

    Attributes:
        plain_share: probability that a sample is plain, from 0 to 1.
        inner: name of the strategy of the others.
        options: its options, as (name, value).
    """

    plain_share: float = 0.0
    inner: str = "full"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_share(self.plain_share)
        self.strategy  # noqa: B018  options that it cannot serve are errors here

    @property
    def name(self) -> str:
        """The inner strategy's, and the share; it is made by --plain-share and not by name."""
        return f"{self.inner}, {100 * self.plain_share:g} % plain"

    @cached_property
    def strategy(self) -> Strategy:
        """The strategy of the samples that are not plain."""
        return make_strategy(
            self.inner, self.train_length, self.target_length, **dict(self.options)
        )

    @property
    def content_length(self) -> int:
        return self.strategy.content_length

    @property
    def shortest_length(self) -> int:
        return self.strategy.shortest_length

    def is_plain(self, seed: int, index: int) -> bool:
        """Say whether sample ``index`` is plain; pure, as its layout."""
        return self._coin(seed, index)[0]

    def layout(self, seed: int, index: int) -> SampleLayout:
        plain, word = self._coin(seed, index)
        if not plain:
            return self.strategy.layout(seed, index)
        chunks = ((0, self.train_length),)
        return PlainLayout(self.train_length, self.target_length, chunks, word)

    def _coin(self, seed: int, index: int) -> tuple[bool, int]:
        """Return whether a sample is plain, and the word that its text is drawn from."""
        coin, word = philox.words(seed, index, 2, _PLAIN_STREAM)
        return philox.unit(coin) < self.plain_share, word


def validate_share(share: float) -> None:
    """Validate a share of plain samples.

    Raises:
        UserError: it is not from 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(
            f"plain_share (--plain-share) is {share}: it must be a share of the samples, 0 to 1"
        )


@dataclass(frozen=True)
class ScalePerSample(Strategy):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales:
            raise UserError(
                f"target_length (--target-length) is {self.target_length}: no scale up to it holds "
                f"{self.train_length} tokens (--seq-length)"
            )
        self.strategies  # noqa: B018  options that one of them cannot serve are errors here

    @property
    def name(self) -> str:
        return f"{self.inner}, one scale per sample"

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
