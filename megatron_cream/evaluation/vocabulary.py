# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and arg-max over a vocabulary that is split over ranks and padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOST_LOGITS = 2**26  # float32 values of logits held at once, 256 MiB


def score_rows(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocabulary: int,
    shard: int = 0,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (float64) and arg-max ``[r]`` for hidden states ``[r, h]``.

    Args:
        logits_of: hidden states ``[q, h]`` to this rank's logits ``[q, v]``, the tokens
            ``shard * v .. (shard + 1) * v - 1``.
        targets: int64 ``[r]``.
        vocabulary: tokens that count; logits of the padding behind them are left out.
        group: the ranks that hold the shards; None where there is one.
    """
    probe = logits_of(hidden[:1])
    chunk = max(1, _MOST_LOGITS // probe.shape[-1])
    parts = [
        _score(logits_of(rows), wanted, vocabulary, shard, group)
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    logprobs, best = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(best)


def _score(
    logits: Tensor, targets: Tensor, vocabulary: int, shard: int, group: Any
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    size = logits.shape[-1]
    first = shard * size
    logits[:, max(0, vocabulary - first) :] = -torch.inf
    highest, best = logits.max(dim=-1)
    top = _reduce(highest.clone(), "MAX", group)
    # A rank whose best is not the best of all answers with an id behind the vocabulary.
    best = _reduce(torch.where(highest == top, best + first, vocabulary), "MIN", group)
    local = targets - first
    here = (local >= 0) & (local < size)
    own = logits.gather(1, local.clamp(0, size - 1)[:, None])[:, 0].double()
    wanted = _reduce(torch.where(here, own, 0.0), "SUM", group)
    # In place: another array of this size costs as much time as the output layer.
    total = _reduce(logits.sub_(top[:, None]).exp_().sum(-1).double(), "SUM", group)
    return wanted - top.double() - total.log(), best


def _reduce(value: Tensor, how: str, group: Any) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, how), group)
    return value
