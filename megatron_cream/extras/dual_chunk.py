# SPDX-License-Identifier: Apache-2.0
"""Trains with dual chunk attention, as ChunkLlama's fine-tuning does, with exact gradients.

Every attention layer gets its queries and keys unrotated and a core attention that rotates inside
(``attention/``). Positions are plain; packed documents each begin anew.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_cream.attention.banded import banded_attention, shards_of
from megatron_cream.attention.bands import dual_chunk
from megatron_cream.attention.beyond_window import attend_last
from megatron_cream.attention.methods import AttentionChoice
from megatron_cream.attention.turning import Rotation
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.build_model import leave_unrotated
from megatron_cream.mcore.hooks import Extra
from megatron_cream.rope.scaling import RopeScaling

FLAG = "--dual-chunk"


class DualChunk(Extra):
    """``--dual-chunk``."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        add(
            FLAG,
            nargs="*",
            metavar="KEY=N",
            help="train with dual chunk attention, chunk_size=N local_size=N in tokens (default: "
            "3/4 and 1/8 of the window that RoPE reaches) and, for Qwen's factor on logits, "
            "original_max_position_embeddings=N",
        )

    def validate_flags(self, args: Namespace, extension: Any) -> None:
        if args.dual_chunk is None:
            return
        _choice(args, extension)
        needs = (
            ("--position-strategy", extension.position_strategy, "full", ": chunks are counted"),
            ("--attention-dropout", args.attention_dropout, 0.0, ""),
            ("--window-size", args.window_size, None, ""),
            ("--no-rope-freq", args.no_rope_freq, None, ": every layer is rotated"),
            ("--softmax-type", args.softmax_type, "vanilla", ""),
        )
        for flag, value, needed, why in needs:
            if value != needed:
                what = "left out" if needed is None else needed
                raise UserError(f"{flag} is {value} with {FLAG}: it must be {what}{why}")
        if extension.trained or extension.mixed_windows or args.hybrid_layer_pattern is not None:
            raise UserError(
                f"{FLAG} is given: it must be left out with --rope-interpolation clex, whose "
                "frequencies are trained, with --mixed-windows and with --hybrid-layer-pattern"
            )

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        words = getattr(args, "dual_chunk", None)
        hooks = config.pre_wrap_hooks
        if words is not None and not any(isinstance(hook, _Install) for hook in hooks):
            sizes = _choice(args, extension)
            args.dual_chunk = [f"{key}={value}" for key, value in sizes.items()]
            hooks.append(_Install(sizes))


def _choice(args: Namespace, extension: ExtensionConfig) -> dict[str, int]:
    """Return the sizes, those that are not given by the window that RoPE reaches.

    Raises:
        UserError: sizes that do not go together.
    """
    scaled = extension.rope_interpolation != "none"
    window = round(extension.original_length * (extension.rope_factor if scaled else 1))
    choice = AttentionChoice.read("dual_chunk", args.dual_chunk)
    sizes = choice.sizes(window, extension.train_length)
    choice.bands(sizes)
    return sizes


class _Install:
    """The hook that Megatron calls with the built model chunks of a rank."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            use_dual_chunk(chunk, **self.sizes)
        return chunks


def use_dual_chunk(model: torch.nn.Module, **sizes: int) -> None:
    """Give every attention layer of a model with our rotary dual chunk attention.

    Args:
        model: a built, unwrapped model chunk that ``install_rotary`` was called with.
        sizes: of ``attention.bands.dual_chunk``.
    """
    from megatron.core.transformer.attention import Attention

    rotary: Any = model.rotary_pos_emb
    leave_unrotated(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.core_attention = DualChunkCore(
                module.config,
                rotary.scaling,
                sizes,
                rotary.attention_factor_in_softmax,
                module.pg_collection.cp,
            )


class DualChunkCore(torch.nn.Module):
    """Megatron's interface to dual chunk attention of unrotated queries and keys.

    Args:
        config: Megatron's transformer config.
        scaling: the RoPE underneath.
        sizes: of ``attention.bands.dual_chunk``.
        factor_in_softmax: whether the softmax scale has the attention factor in it.
        group: context-parallel ranks that a sequence is dealt out over.
    """

    def __init__(
        self,
        config: Any,
        scaling: RopeScaling,
        sizes: dict[str, int],
        factor_in_softmax: bool,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = group if group is not None and group.size() > 1 else None
        self.scaling, self.sizes, self.interleaved = scaling, sizes, config.rotary_interleaved
        self.factor_in_softmax = factor_in_softmax
        scale = config.softmax_scale
        self.scale = config.kv_channels**-0.5 if scale is None else scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Return ``[s, b, h * d]`` of ``[s, b, h, d]``, or ``[t, h * d]`` of packed ones.

        With more keys than queries those are the last tokens.
        """
        rotation = Rotation.of(self.scaling, query, self.interleaved, self.factor_in_softmax)
        packed = query.dim() == 3
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        ranks = 1 if self.group is None else self.group.size()
        tokens = query.shape[0] * ranks
        lengths: Any = _lengths(_ends(packed_seq_params)) if packed else (tokens,)
        if self.group is not None:
            lengths = shards_of(lengths, self.group, query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        bands = dual_chunk(**self.sizes)
        decoding = self.group is None and len(query) < len(key)  # Megatron's inference keeps keys
        if decoding:
            out = attend_last(q, k, v, bands, rotation, self.scale)
        else:
            out = banded_attention(q, k, v, bands, rotation, self.scale, lengths)
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out


def _ends(packed: Any) -> Tensor:
    """Return where documents end, int32 ``[documents + 1]``, padding that belongs to one in it."""
    ends: Tensor | None = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if ends is None else ends


@lru_cache(maxsize=1)
def _lengths(ends: Tensor) -> tuple[int, ...]:
    """Return the tokens of each document; the host waits for the GPU once per micro-batch.

    A tensor is found again by its identity: all layers are given the same one.
    """
    return tuple(length for length in ends.diff().tolist() if length)


EXTRA = DualChunk()
