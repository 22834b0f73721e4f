# SPDX-License-Identifier: Apache-2.0
"""Documents dealt out over context-parallel ranks, zigzag as Megatron deals them.

A document of L tokens is cut into 2 CP pieces, of which rank r has r and 2 CP - 1 - r: causal
attention costs all ranks the same. Queries stay where they are; keys and values are gathered for a
layer's attention, forward and backward, and kept by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, distributed

from megatron_cream.attention.banded import Document


class Shards:
    """This rank's part of documents that lie one behind the other on every rank.

    Args:
        lengths: of the whole documents, multiples of twice the ranks, in tokens.
        group: the context-parallel ranks.
        device: where tensors are.
    """

    def __init__(
        self, lengths: Sequence[int], group: distributed.ProcessGroup, device: torch.device
    ) -> None:
        self._group, self._ranks = group, group.size()
        rank, pieces = group.rank(), 2 * self._ranks
        documents, order, first = [], [], 0
        here = sum(lengths) // self._ranks
        for length in lengths:
            n, row = length // pieces, first // self._ranks
            own = (row, rank * n, n), (row + n, (pieces - 1 - rank) * n, n)
            documents.append(Document((first, first + length), own))
            for piece in range(pieces):
                second = piece >= self._ranks
                begin = (pieces - 1 - piece if second else piece) * here + row + n * second
                order.append(torch.arange(begin, begin + n))
            first += length
        self.documents = tuple(documents)
        # Where each token of the documents is among those of all ranks, and the other way round.
        self._order = torch.cat(order).to(device)
        self._inverse = self._order.argsort()

    def gather(self, own: Tensor) -> Tensor:
        """Return ``[b, g, m, d]`` of all ranks, in the order of the documents."""
        rows = own.permute(2, 0, 1, 3).contiguous()
        every = rows.new_empty(self._ranks * len(rows), *rows.shape[1:])
        distributed.all_gather_into_tensor(every, rows, group=self._group)
        return every[self._order].permute(1, 2, 0, 3)

    def scatter(self, gradient: Tensor) -> Tensor:
        """Return this rank's tokens ``[b, g, n, d]`` of the sum of all ranks' gradients."""
        rows = gradient.permute(2, 0, 1, 3)[self._inverse]
        own = rows.new_empty(len(rows) // self._ranks, *rows.shape[1:])
        distributed.reduce_scatter_tensor(own, rows, group=self._group)
        return own.permute(1, 2, 0, 3)


@lru_cache(maxsize=2)
def shards_of(
    lengths: tuple[int, ...], group: distributed.ProcessGroup, device: torch.device
) -> Shards:
    """Return the shards of documents; those of the last micro-batches are at hand."""
    return Shards(lengths, group, device)
