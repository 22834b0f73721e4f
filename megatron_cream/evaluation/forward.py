# SPDX-License-Identifier: Apache-2.0
"""One forward pass: which tokens go in, who sees whom, and which predictions come out.

A pass holds a context and any number of tails that each continue it. Tails stand at the same
positions and do not see each other, so that each is scored as if the context stood before it
alone; the context, nearly all of the work, is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """Input of a forward pass of b samples of the same shape.

    Attributes:
        tokens: int64 ``[b, n]``, a context of ``n - tails * tail`` tokens, then the tails.
        rows: int64 ``[r]``, which of the n places predict something that is asked for.
        targets: int64 ``[b, r]``, the token that ought to follow each of ``rows``.
        tails: number of tails; none for plain text.
        tail: tokens of each tail.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    tails: int = 0
    tail: int = 0

    @property
    def context(self) -> int:
        """Tokens that all tails continue."""
        return self.tokens.shape[1] - self.tails * self.tail

    def positions(self) -> Tensor:
        """Position ids ``[b, n]``: plain, and every tail right behind the context."""
        context = torch.arange(self.context)
        tail = self.context + torch.arange(self.tail)
        return torch.cat([context, tail.repeat(self.tails)]).expand_as(self.tokens)


@dataclass(frozen=True)
class Scores:
    """What a pass answers, on the CPU.

    Attributes:
        logprobs: float64 ``[b, r]``, natural logarithm of the probability of each target.
        best: int64 ``[b, r]``, the most likely token, what greedy decoding would take.
    """

    logprobs: Tensor
    best: Tensor


class Model(Protocol):
    """A model to score with, on one process or as this rank's part of one.

    Attributes:
        name: the folder that it came from.
        window: tokens that it was trained or extended to.
        vocabulary: tokens that it knows, without padding rows of its output layer.
        shares_context: whether a pass may have more than one tail.
        primary: whether this process writes the results down.
        settings: what decides its answers besides its weights, for the record.
    """

    name: str
    window: int
    vocabulary: int
    shares_context: bool
    primary: bool
    settings: dict

    def set_length(self, length: int) -> None:
        """Turn as for sequences of ``length`` tokens, where a model's angles depend on it."""
        ...

    def run(self, passes: Iterator[Pass]) -> Iterator[Scores]:
        """Answer passes in order; each rank of a model must be given the same ones."""
        ...
