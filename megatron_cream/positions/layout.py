# SPDX-License-Identifier: Apache-2.0
"""SampleLayout: where each trained token of a sample stands, and which tokens it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

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
