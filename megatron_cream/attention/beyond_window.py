# SPDX-License-Identifier: Apache-2.0
"""Dual chunk attention, STRING and SelfExtend, as functions of unrotated queries and keys.

Of whole sequences, by tiles, with gradients; and of few queries to many keys, each pair at the
distance of its band, which decoding with kept keys needs, and prompts that share a context. There
logits of all bands are computed and one of each pair is taken: no gradient, time of bands times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cream.attention.banded import banded_attention
from megatron_cream.attention.bands import Bands, dual_chunk, self_extend, string
from megatron_cream.attention.turning import Rotation
from megatron_cream.errors import UserError
from megatron_cream.rope.scaling import RopeScaling

_MOST_LOGITS = 2**26  # float32 values held at once, 256 MiB


def dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: RopeScaling,
    *,
    chunk_size: int,
    local_size: int,
    original_max_position_embeddings: int = 0,
    softmax_scale: float | None = None,
    lengths: Sequence[int] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Return dual chunk attention ``[b, s, h, d]``, causal, differentiable (arXiv:2402.17463).

    Exact: the softmax over all keys of each query, whose distance to a key in the own chunk is the
    true one, to a key of the chunk before it min(i mod S + S, Q) - j mod S, and to an earlier one
    Q - j mod S, with Q = ``chunk_size`` and S = Q - ``local_size``. No distance exceeds Q, and the
    ``local_size`` nearest keys have their true ones. Up to S tokens are ordinary attention.

    Args:
        q: unrotated, ``[b, s, h, d]``.
        k: unrotated, ``[b, s, g, d]``, g dividing h.
        v: ``[b, s, g, d]``.
        scaling: how positions become angles; its ``dim`` first dimensions of a head turn.
        chunk_size: Q in tokens, the largest distance. ChunkLlama: 3/4 of the trained window.
            Qwen's ``dual_chunk_attention_config``: its ``chunk_size``.
        local_size: tokens that keep their true distance. ChunkLlama: 1/8 of the trained window.
        original_max_position_embeddings: tokens, as in Qwen's ``dual_chunk_attention_config``:
            logits of a document of n > 0 times as many are multiplied by (0.1 ln n + 1) squared,
            where n > 1; none are where it is 0.
        softmax_scale: of the logits; 1 / sqrt(d) if None.
        lengths: tokens of packed documents in each row of the batch; one of s tokens if None.
        interleaved: pairs of dimensions are (0, 1), (2, 3) ...

    Returns:
        ``[b, s, h, d]``, in the type of ``q``; memory is linear in s.

    Raises:
        UserError: sizes or shapes do not fit, or float32 on a GPU.
    """
    bands = dual_chunk(chunk_size, local_size, original_max_position_embeddings)
    return _attend(q, k, v, scaling, bands, softmax_scale, lengths, interleaved)


def string_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: RopeScaling,
    *,
    shift: int,
    local_size: int,
    softmax_scale: float | None = None,
    lengths: Sequence[int] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Return STRING's attention ``[b, s, h, d]``: distances d from S on become d - S + W.

    See arXiv:2410.18745.

    Args:
        q: unrotated, ``[b, s, h, d]``; the other arguments that are not listed here are those of
            ``dual_chunk_attention``.
        shift: S in tokens; the paper takes a third of the trained window.
        local_size: W in tokens; the paper takes 128.

    Returns:
        ``[b, s, h, d]``, in the type of ``q``.

    Raises:
        UserError: sizes or shapes do not fit.
    """
    bands = string(shift, local_size)
    return _attend(q, k, v, scaling, bands, softmax_scale, lengths, interleaved)


def self_extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: RopeScaling,
    *,
    group_size: int,
    window: int,
    softmax_scale: float | None = None,
    lengths: Sequence[int] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Return SelfExtend's attention ``[b, s, h, d]``: beyond w, distances of groups of positions.

    See arXiv:2401.01325.

    Args:
        q: unrotated, ``[b, s, h, d]``; the other arguments that are not listed here are those of
            ``dual_chunk_attention``.
        group_size: G in tokens.
        window: w in tokens, up to which distances stay as they are.

    Returns:
        ``[b, s, h, d]``, in the type of ``q``.

    Raises:
        UserError: sizes or shapes do not fit.
    """
    bands = self_extend(group_size, window)
    return _attend(q, k, v, scaling, bands, softmax_scale, lengths, interleaved)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: RopeScaling,
    bands: Bands,
    softmax_scale: float | None,
    lengths: Sequence[int] | None,
    interleaved: bool,
) -> Tensor:
    tokens = q.shape[1]
    lengths = (tokens,) if lengths is None else tuple(lengths)
    _validate(q, k, v, scaling, lengths)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    rotation = Rotation.of(scaling.at_length(tokens), q, interleaved)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return banded_attention(q, k, v, bands, rotation, scale, lengths).transpose(1, 2)


def _validate(
    q: Tensor, k: Tensor, v: Tensor, scaling: RopeScaling, lengths: Sequence[int]
) -> None:
    b, s, h, d = q.shape
    if k.shape != v.shape or k.shape[:2] != (b, s) or k.shape[3] != d or h % k.shape[2]:
        raise UserError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must be "
            "[b, s, h, d], [b, s, g, d] and [b, s, g, d] with g dividing h"
        )
    if scaling.dim > d:
        raise UserError(f"the interpolation turns {scaling.dim} dimensions: a head has {d}")
    if min(lengths) < 1 or sum(lengths) != s:
        raise UserError(f"lengths sum to {sum(lengths)}: they must be positive and sum to {s}")


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: Bands,
    rotation: Rotation,
    scale: float | Tensor,
    query_places: Tensor,
    key_places: Tensor,
    visible: Tensor,
) -> Tensor:
    """Return attention ``[b, h, n, d]`` of unrotated queries to unrotated keys.

    Args:
        q: ``[b, h, n, d]``.
        k, v: ``[b, g, m, d]``, g dividing h.
        scale: of the logits, or ``[b, 1, 1, 1]``, with ``bands.logit_factor`` in it.
        query_places: int64 ``[b or 1, n]``, each query's place in its document.
        key_places: int64 ``[b or 1, m]``.
        visible: bool ``[b or 1, n, m]``, the keys that a query sees.
    """
    wide = rotation.inv_freq.dtype
    by_position = {at: rotation.turn(k.to(wide), rotation.table(at(key_places)[:, None]))
                   for at in bands.key_positions}  # fmt: skip
    keys = [by_position[at] for at in bands.key_positions]
    values = v.to(wide)
    size = max(1, _MOST_LOGITS // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = zip(
        q.to(wide).split(size, 2), query_places.split(size, 1), visible.split(size, 1), strict=True
    )
    found = []
    for rows, places, seen in parts:
        band = bands.band_of(places[:, :, None], key_places[:, None])[:, None]
        logits = None
        for i, (at, key) in enumerate(zip(bands.query_positions, keys, strict=True)):
            turned = rotation.turn(rows, rotation.table(at(places)[:, None]))
            product = _by_groups(turned, key.transpose(2, 3))
            logits = product if logits is None else torch.where(band == i, product, logits)
        assert logits is not None
        logits = (logits * scale).masked_fill(~seen[:, None], -torch.inf)
        found.append(_by_groups(logits.softmax(-1), values))
    return torch.cat(found, dim=2).to(q.dtype)


def attend_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: Bands,
    rotation: Rotation,
    scale: float,
    before: Tensor | None = None,
) -> Tensor:
    """Return attention ``[b, h, n, d]`` of the last n of m tokens, of which all keys are kept.

    Args:
        q: ``[b, h, n, d]``, unrotated.
        k, v: ``[b, g, m, d]``, g dividing h, unrotated.
        scale: of the logits, which ``bands.logit_factor`` of each text's length multiplies.
        before: int64 ``[b, 1]``, tokens of each row that are before its text; None for none.
    """
    places = torch.arange(k.shape[2], device=k.device)[None]
    if before is not None:
        places = places - before
    own = places[:, -q.shape[2] :]
    scales: float | Tensor = scale
    if bands.original_length:  # by what each text has by now
        factors = [bands.logit_factor(last + 1) for last in own[:, -1].tolist()]
        scales = scale * q.new_tensor(factors, dtype=rotation.inv_freq.dtype).view(-1, 1, 1, 1)
    visible = (places[:, None] <= own[:, :, None]) & (places >= 0)[:, None]
    return attend_rows(q, k, v, bands, rotation, scales, own, places, visible)


def _by_groups(rows: Tensor, shared: Tensor) -> Tensor:
    """Return ``[b, h, n, x] @ [b, g, x, y]``; heads of a group are rows of one product."""
    groups = rows.reshape(rows.shape[0], shared.shape[1], -1, rows.shape[3])
    return (groups @ shared).reshape(*rows.shape[:3], shared.shape[3])
