# SPDX-License-Identifier: Apache-2.0
"""A pass cut over context-parallel ranks the way Transformer Engine's ring attention wants it.

The sequence is cut into ``2 * ranks`` chunks; rank i has chunks i and ``2 * ranks - 1 - i``, so
that causal attention costs all of them the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_cream.evaluation.forward import Pass


class Slice:
    """What one of ``ranks`` context-parallel ranks has of a pass.

    Attributes:
        tokens: ``[b, n / ranks]``; n is made a multiple of ``2 * ranks`` with tokens at the end,
            which no other token sees.
        positions: position ids ``[b, n / ranks]``.
        kept: ``[q]``, where in ``tokens`` the predictions are that this rank has.
        targets: ``[b, q]``, theirs.
    """

    def __init__(self, one: Pass, rank: int, ranks: int) -> None:
        self.ranks, self.shape = ranks, one.targets.shape
        self.tokens, self.positions = one.tokens, one.positions()
        self.kept, self.targets = one.rows, one.targets
        self.which = torch.arange(len(one.rows))
        if ranks > 1:
            self._cut(one, rank)

    def _cut(self, one: Pass, rank: int) -> None:
        batch, length = one.tokens.shape
        step = 2 * self.ranks
        whole = -(-length // step) * step
        padding = torch.zeros(batch, whole - length, dtype=torch.int64)
        tokens = torch.cat([one.tokens, padding], dim=1)
        chunks = torch.arange(whole).chunk(step)
        places = torch.cat([chunks[rank], chunks[step - 1 - rank]])
        local = torch.full((whole,), -1)
        local[places] = torch.arange(len(places))
        self.tokens, self.positions = tokens[:, places], places.expand(batch, -1)
        here = local[one.rows] >= 0
        self.which = here.nonzero()[:, 0]
        self.kept, self.targets = local[one.rows][here], one.targets[:, here]

    def gather(self, logprobs: Tensor, best: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """Return the answers ``[b, r]`` to all rows out of every rank's ``[b, q]``."""
        if self.ranks == 1:
            return logprobs, best
        result = []
        for values in (logprobs, best):
            whole = values.new_zeros(self.shape)
            whole[:, self.which.to(values.device)] = values
            torch.distributed.all_reduce(whole, group=group)
            result.append(whole)
        return result[0], result[1]
