# SPDX-License-Identifier: Apache-2.0
"""Strategies that read one contiguous span of text: plain positions and RandPos."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_cream.positions import philox
from megatron_cream.positions.layout import ChunkLayout, SampleLayout, Span
from megatron_cream.positions.strategy import Strategy


@dataclass(frozen=True)
class FullLayout(ChunkLayout):
    """Positions 0 .. N-1 over the first N tokens."""

    def _spans(self, document_length: int) -> list[Span]:
        return [(0, self.train_length)]


@dataclass(frozen=True)
class Full(Strategy, name="full"):
    """Plain positions ``0 .. N-1``: ordinary training at N."""

    @property
    def content_length(self) -> int:
        return self.train_length

    def layout(self, seed: int, index: int) -> SampleLayout:
        return FullLayout(self.train_length, self.target_length, ((0, self.train_length),))


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class RandPosLayout(SampleLayout):
    """N sorted positions out of T over the first N tokens."""

    positions: np.ndarray = field(repr=False)

    @property
    def position_ids(self) -> np.ndarray:
        return self.positions.copy()

    def runs(self) -> None:
        return None

    def _spans(self, document_length: int) -> list[Span]:
        return [(0, self.train_length)]


@dataclass(frozen=True)
class RandPos(Strategy, name="randpos"):
    """Sorted uniform positions without replacement (Ruoss et al. 2023, arXiv:2305.16843)."""

    @property
    def content_length(self) -> int:
        return self.train_length

    def layout(self, seed: int, index: int) -> SampleLayout:
        rng = philox.generator(seed, index)
        positions = rng.choice(self.target_length, self.train_length, replace=False, shuffle=False)
        positions.sort()
        return RandPosLayout(self.train_length, self.target_length, positions)
