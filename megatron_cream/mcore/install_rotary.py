# SPDX-License-Identifier: Apache-2.0
"""What is put into Megatron's built model, and into its attention, so that angles follow positions.

The rotary embedding that ``model.rotary_pos_emb`` is replaced by, a forward pre-hook that hands it
the model's ``position_ids``, and one name through which attention rotates queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.mcore.fused_rotation import rotate
from megatron_cream.mcore.rotary import PositionRotaryEmbedding
from megatron_cream.rope.scaling import RopeScaling, trainer_of


def fold_attention_factor_into_softmax(config: Any, scaling: RopeScaling) -> bool:
    """Put the attention factor m into ``config.softmax_scale`` if that is the same; say if it was.

    Cos and sin of queries and keys times m make logits m ** 2 times as large. Where every
    dimension of a head is rotated a softmax scale of m ** 2 / sqrt(d) does just that, and the
    fused kernel, which has no factor, stays. To be called before the model is built.

    Args:
        config: Megatron's transformer config.
    """
    factor = scaling.attention_factor
    if factor == 1.0 or scaling.dim != config.kv_channels:
        return False
    scale = config.softmax_scale  # muP has one of its own
    plain = 1.0 / math.sqrt(config.kv_channels) if scale is None else scale
    config.softmax_scale = plain * factor * factor
    return True


def install_rotary(
    model: nn.Module, scaling: RopeScaling, *, attention_factor_in_softmax: bool = False
) -> PositionRotaryEmbedding:
    """Replace ``model.rotary_pos_emb`` and have it follow the ``position_ids`` of every call.

    Args:
        model: a built, unwrapped GPTModel or HybridModel chunk on any pipeline stage.
        scaling: how positions become angles.
        attention_factor_in_softmax: what ``fold_attention_factor_into_softmax`` answered for the
            model's config; if False the attention factor is applied to the rotated dimensions.

    Raises:
        UserError: the model has no rotary embedding of Megatron's ``rope`` kind, or rotates
            another number of dimensions than ``scaling``.
    """
    stock = getattr(model, "rotary_pos_emb", None)
    if not isinstance(stock, RotaryEmbedding):
        raise UserError(
            f"the model's rotary embedding is {type(stock).__name__}: positions reach angles only "
            "through RoPE, --position-embedding-type rope"
        )
    dim = 2 * stock.inv_freq.numel()
    if dim != scaling.dim:
        raise UserError(f"the interpolation has dim {scaling.dim}, the model rotates {dim}")
    trainer = trainer_of(scaling)
    rotary_class = trainer.rotary_class() if trainer else PositionRotaryEmbedding
    rotary = rotary_class(
        scaling,
        rotary_interleaved=stock.rotary_interleaved,
        device=stock.inv_freq.device,
        cp_group=stock.cp_group,
    )
    model.rotary_pos_emb = rotary
    if not attention_factor_in_softmax:
        _scale_rotated(model, scaling.attention_factor)
    rotary.attention_factor_in_softmax = attention_factor_in_softmax
    patch_apply_rotary_pos_emb()
    model.register_forward_pre_hook(_hand_over_position_ids, with_kwargs=True)
    return rotary


ROTATIONS: dict[int, Callable[[Tensor, Tensor, Any], Tensor]] = {}
"""How to rotate queries or keys by what else than angles a rotary embedding may hand to attention,
told apart by the number of dimensions; angles have 4. What makes such tensors registers here."""


def patch_apply_rotary_pos_emb() -> None:
    """Have Megatron's attention rotate by angles of every token of every sample. Idempotent.

    Symbol: ``megatron.core.transformer.attention.apply_rotary_pos_emb``, the name through which
    self-attention of GPTModel and HybridModel rotates queries and keys. Angles that are the same
    for all samples go to Megatron's own function, unchanged.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.core.transformer import attention

    own = getattr(attention, "apply_rotary_pos_emb", None)
    if own is None:
        raise MissingPackageError(
            "megatron.core.transformer.attention.apply_rotary_pos_emb is gone: it may have "
            "changed in your version of megatron-core; megatron_cream is made for 0.19.2"
        )
    if getattr(own, "patched_apply_rotary_pos_emb", False):
        return

    def apply(t: Tensor, freqs: Tensor, config: Any, *args: Any, **kwargs: Any) -> Tensor:
        if freqs.dim() in ROTATIONS:
            return ROTATIONS[freqs.dim()](t, freqs, config)
        mscale = kwargs.get("mscale", 1.0)
        # Megatron leaves the fused kernel for a factor; a single sample's angles are its rows'.
        scaled_rows = mscale != 1.0 and t.dim() == 4 and t.shape[1] == 1
        if freqs.dim() == 4 and (freqs.shape[1] > 1 or scaled_rows):
            return rotate(t, freqs, config, mscale)
        return own(t, freqs, config, *args, **kwargs)

    apply.patched_apply_rotary_pos_emb = True
    attention.apply_rotary_pos_emb = apply


def _scale_rotated(model: nn.Module, factor: float) -> None:
    """Have every attention layer apply the attention factor with its rotation.

    Attribute: ``Attention._yarn_concentration_factor``, what Megatron multiplies cos and sin by.
    It derives it from ``yarn_*`` settings, which cannot say every value.

    Raises:
        ImportError: the attribute moved in this version of Megatron.
    """
    from megatron.core.transformer.attention import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            if not hasattr(module, "_yarn_concentration_factor"):
                raise MissingPackageError(
                    "megatron.core.transformer.attention.Attention._yarn_concentration_factor is "
                    "gone: it may have changed in your version of megatron-core; megatron_cream "
                    "is made for 0.19.2"
                )
            module._yarn_concentration_factor = factor


def _hand_over_position_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    inference = kwargs.get("inference_context") or kwargs.get("inference_params")
    rotary = model.rotary_pos_emb
    if rotary.attention_factor_in_softmax and inference and not inference.is_static_batching():
        raise RuntimeError(
            f"the attention factor {rotary.scaling.attention_factor:g} is in the softmax scale, "
            "which Megatron's dynamic batching ignores: use a static inference context"
        )
    rotary.set_position_ids(position_ids, plain=inference is not None)
