# SPDX-License-Identifier: Apache-2.0
"""Per-token angles through Transformer Engine's fused rotation.

The fused kernel takes angles ``[s, 1, 1, d]``: one for every row, the same for every sample. A
rotation does not care which rows belong to one sample, so queries ``[s, b, h, d]`` seen as
``[s * b, 1, h, d]`` and angles ``[s, b, 1, d]`` seen as ``[s * b, 1, 1, d]`` go through the same
kernel at the same speed. Both are views, also of the strided slices that queries and keys are.

Packed sequences (``thd``) take the same way. Megatron's own path restarts every sequence at
position 0 when fused, and cuts angles for this context-parallel rank a second time when not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor


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
