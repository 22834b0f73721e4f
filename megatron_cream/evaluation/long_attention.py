# SPDX-License-Identifier: Apache-2.0
"""Dual chunk attention, STRING and SelfExtend in the models that are evaluated.

Their queries and keys must come unrotated: ``attend`` rotates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_cream.attention.banded import banded_attention, shards_of
from megatron_cream.attention.bands import Bands
from megatron_cream.attention.beyond_window import attend_last, attend_rows
from megatron_cream.attention.turning import Rotation
from megatron_cream.evaluation.forward import running_tails, seen_keys, tail_mask
from megatron_cream.rope.scaling import RopeScaling


@dataclass(frozen=True)
class BeyondWindow:
    """One attention beyond the window, over one RoPE."""

    bands: Bands
    scaling: RopeScaling
    interleaved: bool = False
    factor_in_scale: bool = False
    """Whether the softmax scale has the attention factor of the RoPE in it."""
    group: ProcessGroup | None = None
    """Context-parallel ranks that a pass is dealt out over, each of which hands its tokens in."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return attention ``[b, h, n, d]``: of a whole pass, or of what follows kept keys.

        Args:
            query: ``[b, h, n, d]``.
            key, value: ``[b, g, m, d]``; with m > n the queries are the last n of m tokens.
            scale: of the logits.
        """
        rotation = Rotation.of(self.scaling, query, self.interleaved, self.factor_in_scale)
        seen = seen_keys()
        if seen is not None:
            key, value = key[:, :, : seen.tokens], value[:, :, : seen.tokens]
        tokens = key.shape[2]
        if self.group is not None:
            whole = shards_of((tokens * self.group.size(),), self.group, query.device)
            return banded_attention(query, key, value, self.bands, rotation, scale, whole)
        if query.shape[2] < tokens:
            # Shorter sequences begin later in the buffer.
            before = None if seen is None else (~seen.mask).sum(1, keepdim=True)
            return attend_last(query, key, value, self.bands, rotation, scale, before)
        count, tail = running_tails()
        if count == 1:
            return banded_attention(query, key, value, self.bands, rotation, scale, (tokens,))
        context = tokens - count * tail
        inside = slice(None), slice(None), slice(context)
        factor = self.bands.logit_factor(context + tail)  # of each question's whole text
        before = banded_attention(
            query[inside], key[inside], value[inside], self.bands, rotation,
            scale * factor / self.bands.logit_factor(context), (context,),
        )  # fmt: skip
        device = query.device
        ends = context + torch.arange(tail, device=device).repeat(count)
        places = torch.cat([torch.arange(context, device=device), ends])[None]
        visible = tail_mask(context, count, tail, device, query.dtype)[None] == 0
        after = attend_rows(
            query[:, :, context:], key, value, self.bands, rotation, scale * factor,
            ends[None], places, visible,
        )  # fmt: skip
        return torch.cat([before, after], dim=2)
