# SPDX-License-Identifier: Apache-2.0
"""Attention of few queries to many keys, each pair at the distance of its band.

What decoding with kept keys needs, and prompts that share a context: tiles are for whole sequences.
Logits of all bands are computed and one of each pair is taken: no gradient, time of bands times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cream.attention.bands import Bands
from megatron_cream.attention.turning import Rotation

_MOST_LOGITS = 2**26  # float32 values held at once, 256 MiB


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
