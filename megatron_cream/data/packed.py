# SPDX-License-Identifier: Apache-2.0
"""Several documents a sample, each at a layout of its own and attending only to itself.

A document of n tokens is trained as a sample of n tokens that reaches T: short documents learn long
distances, too. Documents of N tokens or more have a sample to themselves, at the spans that the
strategy chooses among their first T, next T and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from megatron_cream.data.dataset import SpanDataset
from megatron_cream.data.packing import pack
from megatron_cream.data.sources import PACK_MULTIPLE
from megatron_cream.positions import Layout, Strategy

_MEMBERS = 1 << 20  # of one sample, at most; keeps the layouts of two samples apart


class PackedSpanDataset(SpanDataset):
    """Samples of N tokens made of whole short documents, for thd attention.

    A sample is a dict as SpanDataset's, and ``cu_seqlens``, int32 ``[documents + 1]``: where each
    document ends. The rest of a sample that no document fills is padding without loss, a document
    of its own.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        trained = np.minimum(self.sources.lengths, self.strategy.train_length)
        self.trained = (trained // PACK_MULTIPLE * PACK_MULTIPLE).astype(np.int64)
        self.bins = pack(self.trained, self.strategy.train_length)

    @property
    def epoch_size(self) -> int:
        return len(self.bins)

    def sample(self, idx: int, draw: int) -> dict[str, torch.Tensor]:
        parts = [self.read(source, layout) for source, layout in self._members(idx, draw)]
        padding = self._padding(sum(len(part["tokens"]) for part in parts))
        joined = {
            name: torch.from_numpy(np.concatenate([part[name] for part in [*parts, padding]]))
            for name in padding
        }
        return {**joined, **_boundaries([len(part["tokens"]) for part in [*parts, padding]])}

    def positions(self, idx: int, draw: int | None = None) -> dict[str, torch.Tensor]:
        """Return position ids and boundaries of sample ``idx`` without reading a token."""
        members = self._members(idx, idx if draw is None else draw)
        ids = [layout.position_ids for _, layout in members]
        ids.append(self._padding(sum(map(len, ids)))["position_ids"])
        return {
            "position_ids": torch.from_numpy(np.concatenate(ids)),
            **_boundaries([len(part) for part in ids]),
        }

    def _members(self, idx: int, draw: int) -> Iterator[tuple[int, Layout]]:
        seed = self.config.extension.position_seed
        for i, source in enumerate(self.bins[self.chosen(idx)].tolist()):
            strategy = _for_length(self.strategy, int(self.trained[source]))
            yield source, strategy.layout(seed, int(draw) * _MEMBERS + i)

    def _padding(self, filled: int) -> dict[str, np.ndarray]:
        count = self.strategy.train_length - filled
        nothing = np.zeros(count, dtype=np.int64)
        return {
            "tokens": nothing,
            "labels": nothing,
            "loss_mask": np.zeros(count, dtype=np.float32),
            "position_ids": np.arange(count, dtype=np.int64),
        }


@lru_cache(maxsize=8192)
def _for_length(strategy: Strategy, length: int) -> Strategy:
    """Kept, because a strategy makes tables of its own at its first draw."""
    return strategy.for_length(length)


def _boundaries(lengths: list[int]) -> dict[str, torch.Tensor]:
    ends = np.cumsum([0, *(length for length in lengths if length)])
    return {"cu_seqlens": torch.from_numpy(ends.astype(np.int32))}


class PackedPositions(torch.utils.data.Dataset):
    """Positions and boundaries of packed samples, for pipeline stages that see no tokens.

    Reads the index of the dataset and none of its tokens. ``dataset`` is a PackedSpanDataset or a
    BlendedSpans of such.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        return self.dataset.positions(idx)
