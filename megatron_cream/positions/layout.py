# SPDX-License-Identifier: Apache-2.0
"""What a strategy answers: where each trained token stands, and which tokens to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np

from megatron_cream.errors import UserError

Span = tuple[int, int]
"""(offset, length) in tokens."""


@dataclass(frozen=True)
class SampleLayout(ABC):
    """One sample of ``train_length`` tokens that pretends to span ``target_length``."""

    train_length: int
    target_length: int

    @property
    @abstractmethod
    def position_ids(self) -> np.ndarray:
        """int64 ``[train_length]``, strictly increasing, within ``[0, target_length)``.

        A new array at every call, the caller's own.
        """

    @abstractmethod
    def runs(self) -> list[Span] | None:
        """Maximal pieces of consecutive positions as (first position, length).

        None where there are about as many pieces as tokens.
        """

    def spans(self, document_length: int) -> list[Span]:
        """Return the tokens of the document to read, as (offset, length), in reading order.

        The lengths sum to ``train_length``, the spans lie inside the document and do not overlap.

        Raises:
            UserError: the document has fewer than ``train_length`` tokens.
        """
        if document_length < self.train_length:
            raise UserError(
                f"document_length is {document_length}: a sample takes train_length "
                f"(--seq-length) = {self.train_length} tokens of one document; drop shorter ones "
                "(--min-tokens of tools/preprocess_data.py) or train on --sample-unit packed"
            )
        return self._spans(int(document_length))  # numpy's integers would overflow in a draw

    @abstractmethod
    def _spans(self, document_length: int) -> list[Span]: ...


@dataclass(frozen=True)
class ChunkLayout(SampleLayout):
    """A layout made of a few chunks of consecutive positions.

    ``chunks`` are (first position, length), in increasing order; some may be adjacent.
    """

    chunks: tuple[Span, ...]

    @property
    def position_ids(self) -> np.ndarray:
        table = _all_positions(self.target_length)
        return np.concatenate([table[start : start + length] for start, length in self.chunks])

    def runs(self) -> list[Span]:
        joined: list[Span] = []
        for start, length in self.chunks:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            elif length:
                joined.append((start, length))
        return joined


@lru_cache(maxsize=4)
def _all_positions(target_length: int) -> np.ndarray:
    """0 .. T-1, kept: copying pieces of it is three times as fast as counting them out anew."""
    table = np.arange(target_length, dtype=np.int64)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Strategy(ABC):
    """Where training tokens pretend to stand. Immutable; a layout depends on nothing else.

    Attributes:
        train_length: N, tokens in a sample (--seq-length).
        target_length: T, the window the positions reach (--target-length).
    """

    train_length: int
    target_length: int

    name = ""  # set by each strategy; the value of --position-strategy

    def __post_init__(self) -> None:
        for field in ("train_length", "target_length"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{field} is {value!r}: it must be a whole number of tokens")
            object.__setattr__(self, field, int(value))
        if self.train_length < 1:
            raise UserError(
                f"train_length (--seq-length) is {self.train_length}: it must be at least 1 token"
            )
        if self.target_length < self.train_length:
            raise UserError(
                f"target_length (--target-length) is {self.target_length}: it must be at least "
                f"train_length (--seq-length) = {self.train_length}"
            )

    @property
    def factor(self) -> float:
        """f = T / N, any real number of at least 1."""
        return self.target_length / self.train_length

    @property
    def content_length(self) -> int:
        """Tokens of text a sample is chosen from: T where content follows positions."""
        return self.target_length

    @property
    def shortest_length(self) -> int:
        """Fewest tokens a sample can have with these options and T; see ``for_length``."""
        return 1

    def for_length(self, train_length: int) -> Self:
        """Return this strategy for samples of another length that reach the same T.

        Raises:
            UserError: ``train_length`` is below ``shortest_length`` or above T.
        """
        return replace(self, train_length=train_length)

    @abstractmethod
    def layout(self, seed: int, index: int) -> SampleLayout:
        """Return the layout of sample ``index``; pure, no state, any order."""
