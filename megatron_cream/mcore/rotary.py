# SPDX-License-Identifier: Apache-2.0
"""Rotates queries and keys by the positions of the step's own tokens, in Megatron's models.

Megatron's ``RotaryEmbedding`` is given a length, caches by it and never sees ``position_ids``.
``PositionRotaryEmbedding`` takes its place. A forward pre-hook hands it those that the model is
called with, and attention rotates by them (``rotate``), fused where Megatron fuses.

The fused kernel takes angles ``[s, 1, 1, d]``: one for every row, the same for every sample. A
rotation does not care which rows belong to one sample, so queries ``[s, b, h, d]`` seen as
``[s * b, 1, h, d]`` and angles ``[s, b, 1, d]`` seen as ``[s * b, 1, 1, d]`` go through the same
kernel at the same speed. Both are views, also of the strided slices that queries and keys are.

Packed sequences (``thd``) take the same way. Megatron's own path restarts every sequence at
position 0 when fused, and cuts angles for this context-parallel rank a second time when not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from megatron_cream.errors import UserError
from megatron_cream.mcore.patches import patch, set_built
from megatron_cream.rope.scaling import RopeScaling, trainer_of

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


class PositionRotaryEmbedding(RotaryEmbedding):
    """Rotary angles from position ids.

    Angles are made once per step in float32 and by elementwise products, from the position ids of
    this rank: nothing is cached by length, and under context parallelism nothing is sliced again,
    because the batch's position ids already are.

    Args:
        scaling: the interpolation; its ``dim`` is the number of rotated dimensions d.
        rotary_interleaved: pairs are (0, 1), (2, 3) ... instead of (0, d/2), (1, d/2 + 1) ...
        device: where the frequencies live; Megatron's own are made on the device of the model.
        cp_group: context-parallel group, for plain positions only.

    Attributes:
        makes_tables: ``forward`` returns the table of ``rope.rotation_kernel`` in place of angles,
            with an axis in front that tells it from them: ``[1, s, b, 1, d]``.
    """

    def __init__(
        self,
        scaling: RopeScaling,
        *,
        rotary_interleaved: bool = False,
        device: torch.device | str | None = None,
        cp_group: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.scaling = scaling
        self.rotary_interleaved = rotary_interleaved
        self.cp_group = cp_group
        # A plain attribute, not a buffer: Float16Module would cast a buffer to 8 or 11 bits.
        self.inv_freq = _inv_freq(scaling, device)
        self.seq_len_interpolation_factor = None  # read by Megatron's inference helpers
        self._position_ids: Tensor | None = None
        self._near_inv_freq: Tensor | None = None
        self._far: Tensor | None = None
        self._plain = False
        self.attention_factor_in_softmax = False
        self.makes_tables = False

    def set_length(self, length: int) -> None:
        """Turn as for sequences of ``length`` tokens from now on.

        For evaluation with ``dynamic`` and ``longrope``, whose angles depend on it, as in engines
        that serve them; nothing changes for the others.
        """
        if self.scaling.varies_with_length:
            self.scaling = self.scaling.at_length(length)
            self.inv_freq = _inv_freq(self.scaling, self.inv_freq.device)

    @contextmanager
    def as_served(self) -> Iterator[None]:
        """Turn all samples of a step by the length that is set, and afterwards as before."""
        before = self.scaling, self.inv_freq, self._near_inv_freq
        self._near_inv_freq = None
        try:
            yield
        finally:
            self.scaling, self.inv_freq, self._near_inv_freq = before

    def mix_windows(self) -> None:
        """Have every training step turn near samples as sequences of the original window.

        A step says by ``set_far`` which tokens are of far ones.
        """
        near = self.scaling.at_length(self.scaling.original_length)
        self._near_inv_freq = _inv_freq(near, self.inv_freq.device)

    def set_far(self, far: Tensor) -> None:
        """Hand over which tokens of the next ``forward`` are of far samples, bool ``[b, s]``."""
        self._far = far

    def set_position_ids(self, position_ids: Tensor | None, plain: bool = False) -> None:
        """Hand over the position ids ``[b, s]`` of the next ``forward``.

        With ``plain`` it returns angles by length instead, as Megatron's inference slices them.
        """
        self._position_ids = position_ids
        self._plain = plain

    def angles(self, position_ids: Tensor) -> Tensor:
        """Return float32 angles ``[s, b, 1, d]`` for integer position ids ``[b, s]``.

        Every angle stands twice along d, as Megatron's kernels take it.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        positions = position_ids.transpose(0, 1).to(torch.float32)
        # A product and not a matrix product: that would round positions to 11 bits under TF32.
        angles = positions[:, :, None, None] * self._take_inv_freq()
        if self.rotary_interleaved:
            return angles.repeat_interleave(2, dim=-1)
        return torch.cat((angles, angles), dim=-1)

    def _take_inv_freq(self) -> Tensor:
        """Return the frequencies of this step, ``[d / 2]`` or by token ``[s, b, 1, d / 2]``."""
        far, self._far = self._far, None
        if self._near_inv_freq is None:
            return self.inv_freq
        if far is not None:
            self._near_inv_freq = self._near_inv_freq.to(self.inv_freq.device)
            far = far.transpose(0, 1)[:, :, None, None]
            return torch.where(far, self.inv_freq, self._near_inv_freq)
        if self.training:
            raise RuntimeError(
                "PositionRotaryEmbedding mixes windows and was not told which samples of this step "
                "are far: call set_far before the model, as megatron_cream's forward step does"
            )
        return self.inv_freq

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> Tensor:
        """Return the angles of the positions that were set; called by the model once per step.

        ``[s, b, 1, d]``, or ``[1, tokens, 1, d]`` for packed sequences. ``max_seq_len`` is what
        Megatron computed from the hidden states: the number of tokens over all context-parallel
        ranks. It is checked against the position ids.

        Raises:
            RuntimeError: no position ids were set since the last call.
            UserError: their number is not the number of tokens of the step.
        """
        if self._plain:
            return self.plain_angles(max_seq_len, offset, cp_group)
        angles = self.angles(self.take_position_ids(max_seq_len, packed_seq, cp_group))
        if self.makes_tables:
            from megatron_cream.rope.rotation_kernel import table

            in_softmax = self.attention_factor_in_softmax
            factor = 1.0 if in_softmax else self.scaling.attention_factor
            return table(angles, factor, self.rotary_interleaved).unsqueeze(0)
        # [1, tokens, 1, d] says that packed angles are of these very tokens, already cut for
        # this rank; [tokens, 1, 1, d] would be taken for one sequence's and cut again.
        return angles.transpose(0, 1) if packed_seq else angles

    def take_position_ids(self, max_seq_len: int, packed_seq: bool, cp_group: Any) -> Tensor:
        """Return the position ids ``[b, s]`` that were set, once; see ``forward``."""
        position_ids, self._position_ids = self._position_ids, None
        if position_ids is None:
            raise RuntimeError(
                "PositionRotaryEmbedding has no position ids for this step: call the model with "
                "position_ids on every pipeline stage"
            )
        group = cp_group if cp_group is not None else self.cp_group
        ranks = group.size() if group is not None else 1
        if not packed_seq and position_ids.shape[-1] * ranks != max_seq_len:
            raise UserError(
                f"position_ids has shape {tuple(position_ids.shape)} on each of {ranks} "
                f"context-parallel ranks: the step has {max_seq_len} tokens per sample"
            )
        return position_ids

    def plain_angles(self, length: int, offset: int = 0, cp_group: Any = None) -> Tensor:
        """Return angles ``[length, 1, 1, d]`` of positions ``offset .. offset + length - 1``.

        What Megatron's own rotary returns for that length, with this interpolation.
        """
        positions = torch.arange(offset, offset + length, device=self.inv_freq.device)
        emb = self.angles(positions[None])
        group = cp_group if cp_group is not None else self.cp_group
        if group is not None and group.size() > 1:
            emb = rope_utils.get_pos_emb_on_this_cp_rank(emb, 0, group)
        return emb


def rounded_powers(scaling: RopeScaling, device: torch.device | str | None) -> Tensor:
    """Return float32 ``[dim // 2]`` theta ** (2 i / d), rounded as Megatron's and transformers'.

    Both compute the power in float32. Rounding the exact value instead would differ in the last
    bit of some frequencies, which at position 262143 is an angle of 0.016.
    """
    exponents = torch.arange(0, scaling.dim, 2, dtype=torch.float32, device=device) / scaling.dim
    return scaling.theta**exponents


def _inv_freq(scaling: RopeScaling, device: torch.device | str | None) -> Tensor:
    """Return float32 ``[dim // 2]`` frequencies, rounded likewise."""
    powers = rounded_powers(scaling, device)
    if powers.is_meta:  # a layout that is only counted
        return powers
    return torch.from_numpy(scaling.rounded(powers.cpu().numpy())).to(powers.device)


def fold_attention_factor_into_softmax(config: Any, scaling: RopeScaling) -> bool:
    """Put the attention factor m into ``config.softmax_scale`` if that is the same; return whether.

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
    model: nn.Module,
    scaling: RopeScaling,
    *,
    attention_factor_in_softmax: bool = False,
    mixed_windows: bool = False,
) -> PositionRotaryEmbedding:
    """Replace ``model.rotary_pos_emb`` and have it follow the ``position_ids`` of every call.

    Args:
        model: a built, unwrapped GPTModel or HybridModel chunk on any pipeline stage.
        scaling: how positions become angles.
        attention_factor_in_softmax: what ``fold_attention_factor_into_softmax`` answered for the
            model's config; if False the attention factor is applied to the rotated dimensions.
        mixed_windows: see ``ExtensionConfig``; ``scaling`` then has a list for each length.

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
    if mixed_windows:
        rotary.mix_windows()
    model.rotary_pos_emb = rotary
    if not attention_factor_in_softmax:
        _scale_rotated(model, scaling.attention_factor)
    rotary.attention_factor_in_softmax = attention_factor_in_softmax
    patch_apply_rotary_pos_emb.apply()
    model.register_forward_pre_hook(_hand_over_position_ids, with_kwargs=True)
    return rotary


def _scale_rotated(model: nn.Module, factor: float) -> None:
    """Have every attention layer apply the attention factor with its rotation.

    ``_yarn_concentration_factor`` is what Megatron multiplies cos and sin by. It derives it from
    ``yarn_*`` settings, which cannot say every value.
    """
    from megatron.core.transformer.attention import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            set_built(module, "_yarn_concentration_factor", factor)


def _hand_over_position_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    inference = kwargs.get("inference_context") or kwargs.get("inference_params")
    rotary: Any = model.rotary_pos_emb
    if rotary.attention_factor_in_softmax and inference and not inference.is_static_batching():
        raise RuntimeError(
            f"the attention factor {rotary.scaling.attention_factor:g} is in the softmax scale, "
            "which Megatron's dynamic batching ignores: use a static inference context"
        )
    rotary.set_position_ids(position_ids, plain=inference is not None)
