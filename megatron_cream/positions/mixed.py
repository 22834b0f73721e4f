# SPDX-License-Identifier: Apache-2.0
"""Some samples at plain positions among those of another strategy.

A model that is trained at far positions alone gets a little worse within its old window, where most
of its work is. A share of plain samples, N consecutive tokens at 0 .. N-1, keeps it as good. Which
samples are plain is a coin of (seed, index), so that every pipeline stage knows it by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions import make_strategy, philox
from megatron_cream.positions.layout import ChunkLayout, SampleLayout, Span, Strategy

_PLAIN_STREAM = 4  # keeps the coin apart from the layout of the same sample


@dataclass(frozen=True)
class PlainLayout(ChunkLayout):
    """Positions 0 .. N-1 over N consecutive tokens, anywhere in the document."""

    word: int

    def _spans(self, document_length: int) -> list[Span]:
        room = document_length - self.train_length
        return [(philox.below(self.word, room + 1), self.train_length)]


@dataclass(frozen=True)
class Mixed(Strategy):
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
        check_share(self.plain_share)
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


def check_share(share: float) -> None:
    """Refuse a share of plain samples that is none.

    Raises:
        UserError: it is not from 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(
            f"plain_share (--plain-share) is {share}: it must be a share of the samples, 0 to 1"
        )
