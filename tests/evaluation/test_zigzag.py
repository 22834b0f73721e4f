# SPDX-License-Identifier: Apache-2.0
"""Slices of context-parallel ranks are Megatron's own, and their answers make the whole."""

import pytest
import torch

from megatron_cream.evaluation.forward import ForwardPass
from megatron_cream.evaluation.megatron_model import ContextShard


def make(length=21, rows=(3, 7, 8, 20)):
    tokens = torch.arange(2 * length).view(2, length) + 100
    kept = torch.tensor(rows)
    return ForwardPass(tokens, kept, kept[None] + torch.tensor([[1000], [2000]]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_is_on_one_rank(ranks):
    one = make()
    slices = [ContextShard(one, rank, ranks) for rank in range(ranks)]
    assert sorted(i for part in slices for i in part.which.tolist()) == [0, 1, 2, 3]
    for part in slices:
        where = part.positions[:, part.kept]
        assert torch.equal(where[0], one.rows[part.which])
        assert torch.equal(part.targets, one.targets[:, part.which])
        assert torch.equal(part.tokens[:, part.kept], one.tokens[:, where[0]])


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_are_megatrons(ranks, monkeypatch):
    from megatron.core.utils import get_batch_on_this_cp_rank

    one, group = make(length=24), object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        batch = {"tokens": one.tokens, "position_ids": one.positions()}
        own = get_batch_on_this_cp_rank(batch, False, cp_group=group)
        part = ContextShard(one, rank, ranks)
        assert torch.equal(own["tokens"], part.tokens)
        assert torch.equal(own["position_ids"], part.positions)
