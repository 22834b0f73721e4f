# SPDX-License-Identifier: Apache-2.0
"""Rotates queries and keys by angles of every token of every sample, fused where Megatron fuses.

The fused kernel takes angles ``[s, 1, 1, d]``: one for every row, the same for every sample. A
rotation does not care which rows belong to one sample, so queries ``[s, b, h, d]`` seen as
``[s * b, 1, h, d]`` and angles ``[s, b, 1, d]`` seen as ``[s * b, 1, 1, d]`` go through the same
kernel at the same speed. Both are views, also of the strided slices that queries and keys are.

Packed sequences (``thd``) take the same way. Megatron's own path restarts every sequence at
position 0 when fused, and cuts angles for this context-parallel rank a second time when not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_cream.mcore.patches import patch

ROTATIONS: dict[int, Callable[[Tensor, Tensor, Any], Tensor]] = {}
"""How to rotate queries or keys by what else than angles a rotary embedding may hand to attention,
told apart by the number of dimensions; angles have 4. What makes such tensors registers here."""


def rotate(t: Tensor, angles: Tensor, config: Any, mscale: float = 1.0) -> Tensor:
    """Rotate ``t`` by angles of its own tokens, fused where ``config.apply_rope_fusion`` is on.

    Args:
        t: queries or keys, ``[s, b, h, d]`` with angles ``[s, b, 1, d_rot]``, or packed
            ``[tokens, h, d]`` with angles ``[1, tokens, 1, d_rot]``.
        angles: float32.
        config: Megatron's transformer config.
        mscale: multiplies cos and sin. The fused kernel has none: the rotated dimensions are
            multiplied after it, one elementwise pass.
    """
    shape = t.shape
    rows = t.unsqueeze(1) if t.dim() == 3 else t.flatten(0, 1).unsqueeze(1)
    flat = angles.reshape(rows.shape[0], 1, 1, angles.shape[-1])
    if config.apply_rope_fusion:
        rotated = rope_utils.fused_apply_rotary_pos_emb(
            rows, flat, interleaved=config.rotary_interleaved
        )
        if mscale != 1.0:
            turned, rest = rotated.tensor_split([angles.shape[-1]], dim=-1)
            # A number and not a tensor of bfloat16, in which 1.2079 would be 1.2109.
            rotated = torch.cat((turned * mscale, rest), dim=-1)
    else:
        rotated = rope_utils._apply_rotary_pos_emb_bshd(
            rows, flat, rotary_interleaved=config.rotary_interleaved, mscale=mscale
        )
    return rotated.view(shape)


@patch(
    "megatron.core.transformer.attention:apply_rotary_pos_emb",
    needs=("t", "freqs", "config", "mscale"),
    why="Attention of GPTModel and HybridModel rotates through this name alone, by one row of "
    "angles for all samples; here every token of every sample has its own.",
)
def patch_apply_rotary_pos_emb(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Angles that are the same for all samples go to Megatron's own function, unchanged."""

    def apply_rotary_pos_emb(
        t: Tensor, freqs: Tensor, config: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if freqs.dim() in ROTATIONS:
            return ROTATIONS[freqs.dim()](t, freqs, config)
        mscale = kwargs.get("mscale", 1.0)
        # Megatron leaves the fused kernel for a factor; a single sample's angles are its rows'.
        scaled_rows = mscale != 1.0 and t.dim() == 4 and t.shape[1] == 1
        if freqs.dim() == 4 and (freqs.shape[1] > 1 or scaled_rows):
            return rotate(t, freqs, config, mscale)
        return own(t, freqs, config, *args, **kwargs)

    return apply_rotary_pos_emb
