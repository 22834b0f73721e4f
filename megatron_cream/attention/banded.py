# SPDX-License-Identifier: Apache-2.0
"""Attention over bands: tiles by plain kernels, one softmax over all of them, exact gradients.

Memory is linear in the number of tokens: q, turned k, v, the output and one number per query and
head are kept for the backward pass, which turns q anew and cuts the same pairs into fewer tiles.
Over context-parallel ranks k and v are kept as they came, this rank's, and gathered again.

Everything made here lies as ``[s, b, h, d]`` and is seen as ``[b, h, s, d]``. PyTorch finds a cuDNN
graph again by the shapes and strides of q, k and v alone, so those of a tile's output, its gradient
and its log-sum-exp must follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_cream.attention import sdpa
from megatron_cream.attention.bands import Bands, Tile, TileShape
from megatron_cream.attention.sdpa import TileAttention
from megatron_cream.attention.turning import Rotation, Turning, takes_triton, wide
from megatron_cream.errors import UserError

if TYPE_CHECKING:
    from megatron_cream.attention.shards import Shards

Span = tuple[int, int]

# Whose queries are turned together: launches cost the host more than short tiles the GPU.
_GROUPS_AT_ONCE = 8


@dataclass(frozen=True)
class Document:
    """Tokens that attend to each other only.

    Attributes:
        keys: where its keys are, ``[first, end)``.
        queries: of each stretch of its queries that is here the row of the first in q, its place
            in the document, and the number of tokens.
    """

    keys: Span
    queries: tuple[tuple[int, int, int], ...]

    @property
    def tokens(self) -> int:
        """How many tokens it has, on all ranks."""
        return self.keys[1] - self.keys[0]


def whole_documents(lengths: Sequence[int]) -> tuple[Document, ...]:
    """Return documents of ``lengths`` tokens, one behind the other, with all their queries."""
    ends = torch.tensor((0, *lengths)).cumsum(0).tolist()
    return tuple(Document((a, b), ((a, 0, b - a),)) for a, b in pairwise(ends))


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bands: Bands,
    rotation: Rotation,
    scale: float,
    lengths: tuple[int, ...] | Shards,
) -> Tensor:
    """Return attention ``[b, h, n, d]`` over ``bands`` of unrotated q and k.

    Args:
        q: ``[b, h, n, d]``.
        k, v: ``[b, g, n, d]``, g dividing h.
        scale: of the logits, which ``bands.logit_factor`` of a document's length multiplies.
        lengths: tokens of the documents in each row of the batch, which attend only to
            themselves; they sum to n. Or how they are dealt out over context-parallel ranks.

    Raises:
        UserError: a type that no kernel takes.
    """
    require_type(q.dtype, q.is_cuda)
    return _Banded.apply(q, k, v, bands, rotation, scale, lengths)


def require_type(dtype: torch.dtype, on_gpu: bool) -> None:
    """Check that there is a kernel for tensors of this type.

    Raises:
        UserError: there is none.
    """
    if on_gpu and dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            "attention beyond the window on a GPU has tensors of "
            f"{str(dtype).removeprefix('torch.')}: its kernels need --dtype bfloat16 or float16 "
            "(--bf16 or --fp16 of training)"
        )


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bands: Bands,
        rotation: Rotation,
        scale: float,
        lengths: tuple[int, ...] | Shards,
    ) -> Tensor:
        shards = None
        if isinstance(lengths, tuple):
            documents = whole_documents(lengths)
        else:
            shards, documents = lengths, lengths.documents
        turning = _turning(bands, rotation, documents, q)
        out, lse = _empty(q), torch.empty(q.shape[:3], dtype=wide(q), device=q.device)
        saved = [q, out, lse] if shards is None else [q, out, lse, k, v]
        if shards is not None:
            k, v = shards.gather(k), shards.gather(v)
        kept = [turning.keys(_cut(k, document.keys)) for document in documents]
        for document, keys in zip(documents, kept, strict=True):
            values = _cut(v, document.keys)
            own_scale = scale * bands.logit_factor(document.tokens)
            for row, place, tokens in document.queries:
                own, *merged = (_cut(x, (row, row + tokens)) for x in (q, out, lse))
                for groups in batched(bands.groups(place, place + tokens), _GROUPS_AT_ONCE):
                    _attend(groups, turning, (own, *merged), place, keys, values, own_scale)
        if shards is None:
            saved += [v, *(key for keys in kept for key in keys)]
        ctx.save_for_backward(*saved)
        ctx.settings = bands, rotation, scale, documents, shards
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *others = ctx.saved_tensors
        bands, rotation, scale, documents, shards = ctx.settings
        turning = _turning(bands, rotation, documents, q)
        if shards is None:
            v, *keys = others
            frames = len(keys) // len(documents)
            kept = [keys[i : i + frames] for i in range(0, len(keys), frames)]
        else:
            k, v = (shards.gather(x) for x in others)
            kept = [turning.keys(_cut(k, document.keys)) for document in documents]
        merged = _laid_out(grad), out, lse
        dq, dk, dv = _empty(q), _empty(v), _empty(v)
        for document, turned in zip(documents, kept, strict=True):
            own = (*turned, *(_cut(x, document.keys) for x in (v, dk, dv)))
            own_scale = scale * bands.logit_factor(document.tokens)
            _pull_back((*merged, q, dq), own, bands, turning, document.queries, own_scale)
        if shards is not None:
            dk, dv = shards.scatter(dk), shards.scatter(dv)
        return (dq, dk, dv, None, None, None, None)


def _turning(bands: Bands, rotation: Rotation, documents: Sequence[Document], q: Tensor) -> Turning:
    longest = max(document.tokens for document in documents)
    return Turning(bands, rotation, longest, q.device)


def _attend(
    groups: Sequence[Sequence[Tile]],
    turning: Turning,
    rows: tuple[Tensor, ...],
    place: int,
    keys: Sequence[Tensor],
    values: Tensor,
    scale: float,
) -> None:
    """Write the output and log-sum-exp of some groups, whose queries are turned in one launch.

    Args:
        rows: q, unrotated, and where output and log-sum-exp go, of the places from ``place`` on.
        keys: of the whole document, turned.
    """
    q, out, lse = rows
    tiles = [tile for group in groups for tile in group]
    span = min(tile.rows[0] for tile in tiles), max(tile.rows[1] for tile in tiles)
    frames = sorted({turning.query_frames[tile.band] for tile in tiles})
    turned = turning.turn(_cut(q, span, place), span[0], frames)
    by_frame = dict(zip(frames, turned, strict=True))
    for group in groups:
        outputs = []
        for tile in group:
            query = _cut(by_frame[turning.query_frames[tile.band]], tile.rows, span[0])
            key = _cut(turning.key(tile, keys), tile.columns)
            value = _cut(values, tile.columns)
            outputs.append((tile, _run(query, key, value, tile, scale)))
        _merge(out, lse, place, outputs)


def _run(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> TileAttention:
    q, k, v = (_mirror(x, tile) for x in (q, k, v))
    found = sdpa.forward(q, k, v, tile.shape is not TileShape.FULL, scale)
    return TileAttention(*(_mirror(x, tile) for x in found))


def _merge(
    out: Tensor, lse: Tensor, place: int, outputs: Sequence[tuple[Tile, TileAttention]]
) -> None:
    """Write the one softmax over all tiles of a group into ``out`` and ``lse``.

    Args:
        place: of the first query in them.
    """
    first = min(tile.rows[0] for tile, _ in outputs)
    end = max(tile.rows[1] for tile, _ in outputs)
    out, lse = (_cut(x, (first, end), place) for x in (out, lse))
    if len(outputs) == 1:
        out[:], lse[:] = outputs[0][1]
        return
    if takes_triton(out) and all(tile.rows == (first, end) for tile, _ in outputs):
        from megatron_cream.attention.merge_kernel import merge

        merge([one.out for _, one in outputs], [one.lse for _, one in outputs], out, lse)
        return
    total = torch.full_like(lse, -torch.inf)
    merged = torch.zeros(out.shape, dtype=lse.dtype, device=out.device)
    for tile, one in outputs:
        rows = _cut(total, tile.rows, first)
        rows.copy_(torch.logaddexp(rows, one.lse))
    for tile, one in outputs:
        share = (one.lse - _cut(total, tile.rows, first)).exp().unsqueeze(-1)
        _cut(merged, tile.rows, first).addcmul_(one.out.to(merged.dtype), share)
    out.copy_(merged)
    lse.copy_(total)


def _pull_back(
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    bands: Bands,
    turning: Turning,
    queries: Sequence[tuple[int, int, int]],
    scale: float,
) -> None:
    """Write the gradients of a document's queries, keys and values.

    Args:
        rows: the gradient of the output, the output, the log-sum-exp, q, and where dq goes.
        columns: of the document: keys by each frame, values, and where dk and dv go.
        queries: the stretches of its queries that are here.
    """
    *keys, values, dk, dv = columns
    tiles = [tuple(bands.backward_tiles(place, place + n)) for _, place, n in queries]
    spans = [tile.columns for some in tiles for tile in some]
    unseen = max(end for _, end in spans), dk.shape[2]  # keys after the last query that is here
    _cut(dk, unseen).zero_()
    _cut(dv, unseen).zero_()
    sums = _Sum(spans, turning, dk), _Sum(spans, turning, dv)
    for (row, place, n), some in zip(queries, tiles, strict=True):
        grad, out, lse, q, dq = (_cut(x, (row, row + n)) for x in rows)
        sum_q = _Sum([tile.rows for tile in some], turning, dq, place)
        for tile in some:
            frame, key_frame = turning.query_frames[tile.band], turning.key_frames[tile.band]
            (query,) = turning.turn(_cut(q, tile.rows, place), tile.rows[0], [frame])
            key, value = (_cut(x, tile.columns) for x in (turning.key(tile, keys), values))
            merged = (_cut(x, tile.rows, place) for x in (grad, out, lse))
            inputs = [_mirror(x, tile) for x in (*merged, query, key, value)]
            found = sdpa.backward(inputs, tile.shape is not TileShape.FULL, scale)
            for total, part, span, by in zip(
                (sum_q, *sums), found, (tile.rows, tile.columns, tile.columns),
                (frame, key_frame, None), strict=True,
            ):  # fmt: skip
                total.add(span, _mirror(part, tile), by)


class _Sum:
    """A gradient, of which tiles give parts.

    A stretch of tokens is written when its last part is there, so that few of them are held.

    Args:
        spans: places of all parts that will be added.
        target: ``[b, h, n, d]``, of the places from ``first`` on.
    """

    def __init__(
        self, spans: Sequence[Span], turning: Turning, target: Tensor, first: int = 0
    ) -> None:
        edges = sorted({edge for span in spans for edge in span})
        self._missing = {
            stretch: count
            for stretch in pairwise(edges)
            if (count := sum(_holds(span, stretch) for span in spans))
        }
        self._parts: dict[Span, list[tuple[int | None, Tensor]]] = {x: [] for x in self._missing}
        self._turning, self._target, self._first = turning, target, first

    def add(self, span: Span, part: Tensor, frame: int | None) -> None:
        """Add a part ``[b, h, n, d]``, to be turned back by a frame."""
        for stretch in [stretch for stretch in self._missing if _holds(span, stretch)]:
            self._parts[stretch].append((frame, _cut(part, stretch, span[0])))
            self._missing[stretch] -= 1
            if not self._missing[stretch]:
                del self._missing[stretch]
                target = _cut(self._target, stretch, self._first)
                self._turning.turn_back(self._parts.pop(stretch), stretch[0], target)


def _holds(span: Span, stretch: Span) -> bool:
    return span[0] <= stretch[0] and stretch[1] <= span[1]


def _cut(x: Tensor, span: Span, first: int = 0) -> Tensor:
    """Return the tokens of ``span`` of a tensor whose first token is ``first``."""
    return x.narrow(2, span[0] - first, span[1] - span[0])


def _mirror(x: Tensor, tile: Tile) -> Tensor:
    return x.flip(2) if tile.shape is TileShape.ANTICAUSAL else x


def _empty(like: Tensor) -> Tensor:
    b, h, n, d = like.shape
    return like.new_empty(n, b, h, d).permute(1, 2, 0, 3)


def _laid_out(x: Tensor) -> Tensor:
    """Return ``[b, h, n, d]`` that lies as ``[n, b, h, d]``."""
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
