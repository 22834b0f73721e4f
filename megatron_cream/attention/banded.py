# SPDX-License-Identifier: Apache-2.0
"""Attention over bands: tiles by plain kernels, one softmax over all of them, exact gradients.

Memory is linear in the number of tokens: q, turned k, v, the output and one number per query and
head are kept for the backward pass, which turns q anew.
Over context-parallel ranks k and v are kept as they came, this rank's, and gathered again.

Everything made here lies as ``[s, b, h, d]`` and is seen as ``[b, h, s, d]``. PyTorch finds a cuDNN
graph again by the shapes and strides of q, k and v alone, so those of a tile's output, its gradient
and its log-sum-exp must follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_cream.attention import sdpa
from megatron_cream.attention.bands import Bands, Tile, TileShape, joined
from megatron_cream.attention.sdpa import TileAttention
from megatron_cream.attention.turning import Rotation, Turning, takes_triton, turning_of, wide

Span = tuple[int, int]

# Of bands, whose queries are turned and merged together: enough for large tiles, and few of the
# queries' turned copies are held.
_PERIODS_AT_ONCE = 8


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


class Shards:
    """This rank's part of documents that lie one behind the other on every rank, zigzag.

    A document of L tokens is cut into 2 CP pieces, of which rank r has r and 2 CP - 1 - r, as
    Megatron deals them: causal attention costs all ranks the same. Queries stay where they are;
    keys and values are gathered for a layer's attention, forward and backward, and kept by nobody.

    Args:
        lengths: of the whole documents, multiples of twice the ranks, in tokens.
        group: the context-parallel ranks.
        device: where tensors are.
    """

    def __init__(
        self, lengths: Sequence[int], group: distributed.ProcessGroup, device: torch.device
    ) -> None:
        self._group, self._ranks = group, group.size()
        rank, pieces = group.rank(), 2 * self._ranks
        documents, order, first = [], [], 0
        here = sum(lengths) // self._ranks
        for length in lengths:
            n, row = length // pieces, first // self._ranks
            own = (row, rank * n, n), (row + n, (pieces - 1 - rank) * n, n)
            documents.append(Document((first, first + length), own))
            for piece in range(pieces):
                second = piece >= self._ranks
                begin = (pieces - 1 - piece if second else piece) * here + row + n * second
                order.append(torch.arange(begin, begin + n))
            first += length
        self.documents = tuple(documents)
        # Where each token of the documents is among those of all ranks, and the other way round.
        self._order = torch.cat(order).to(device)
        self._inverse = self._order.argsort()

    def gather(self, own: Tensor) -> Tensor:
        """Return ``[b, g, m, d]`` of all ranks, in the order of the documents."""
        rows = own.permute(2, 0, 1, 3).contiguous()
        every = rows.new_empty(self._ranks * len(rows), *rows.shape[1:])
        distributed.all_gather_into_tensor(every, rows, group=self._group)
        return every[self._order].permute(1, 2, 0, 3)

    def scatter(self, gradient: Tensor) -> Tensor:
        """Return this rank's tokens ``[b, g, n, d]`` of the sum of all ranks' gradients."""
        rows = gradient.permute(2, 0, 1, 3)[self._inverse]
        own = rows.new_empty(len(rows) // self._ranks, *rows.shape[1:])
        distributed.reduce_scatter_tensor(own, rows, group=self._group)
        return own.permute(1, 2, 0, 3)


@lru_cache(maxsize=2)
def shards_of(
    lengths: tuple[int, ...], group: distributed.ProcessGroup, device: torch.device
) -> Shards:
    """Return the shards of documents; those of the last micro-batches are at hand."""
    return Shards(lengths, group, device)


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
    sdpa.require_type(q.dtype, q.is_cuda)
    return _Banded.apply(q, k, v, bands, rotation, scale, lengths)


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
                for span in _stretches(place, place + tokens, bands.period):
                    rows = [_cut(x, span, place - row) for x in (q, out, lse)]
                    _attend(span, bands, turning, rows, keys, values, own_scale)
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
    return turning_of(bands, rotation, min(longest, bands.period or longest), q.device)


def _stretches(first: int, end: int, period: int | None) -> list[Span]:
    """Return the stretches of queries that are turned and merged together, the last first.

    Its tiles are the largest: while the GPU computes them, the host gets ahead with the others,
    whose start takes it longer than some of them take the GPU.
    """
    size = _PERIODS_AT_ONCE * period if period else end
    begins = reversed(range(first // size * size, end, size))
    return [(max(first, begin), min(end, begin + size)) for begin in begins]


def _attend(
    span: Span,
    bands: Bands,
    turning: Turning,
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Tensor,
    scale: float,
) -> None:
    """Write the output and log-sum-exp of the queries of ``span``, which are turned in one launch.

    Args:
        rows: q, unrotated, and where output and log-sum-exp go.
        keys: of the whole document, turned.
    """
    (q, out, lse), first = rows, span[0]
    # Of one sample, tiles that are alike are a batch by a view.
    tiles = joined(bands.tiles(*span), _PERIODS_AT_ONCE if len(q) == 1 else 1)
    frames = sorted({turning.query_frames[tile.band] for tile in tiles})
    queries = dict(zip(frames, turning.turn(q, first, frames), strict=True))

    def merge(stretch: Span, parts: Sequence[tuple[Span, TileAttention]]) -> None:
        found = [TileAttention(*(_cut(x, stretch, own[0]) for x in one)) for own, one in parts]
        _merge(found, *(_cut(x, stretch, first) for x in (out, lse)))

    parts = _Parts([one.rows for tile in tiles for one in tile.singles()], merge)
    for tile in tiles:
        query = _blocks(queries[turning.query_frames[tile.band]], tile.rows, tile, first)
        key, value = (_blocks(x, tile.columns, tile) for x in (turning.key(tile, keys), values))
        found = (x.chunk(tile.count) for x in _run(query, key, value, tile, scale))
        for one, *part in zip(tile.singles(), *found, strict=True):
            parts.add(one.rows, TileAttention(*part))


def _run(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> TileAttention:
    q, k, v = (_mirror(x, tile) for x in (q, k, v))
    found = sdpa.forward(q, k, v, tile.shape is not TileShape.FULL, scale)
    return TileAttention(*(_mirror(x, tile) for x in found))


def _merge(parts: Sequence[TileAttention], out: Tensor, lse: Tensor) -> None:
    """Write the one softmax over all tiles of some queries into ``out`` and ``lse``."""
    if len(parts) == 1:
        out[:], lse[:] = parts[0]
        return
    if takes_triton(out):
        from megatron_cream.attention.merge_kernel import merge

        merge([part.out for part in parts], [part.lse for part in parts], out, lse)
        return
    lse[:] = torch.stack([part.lse for part in parts]).logsumexp(0)
    out[:] = sum(part.out.to(lse.dtype) * (part.lse - lse).exp().unsqueeze(-1) for part in parts)


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
    # Each a call of its own: gradients of several would be held beside those of larger ones.
    tiles = [tuple(bands.tiles(place, place + n)) for _, place, n in queries]
    spans = [tile.columns for some in tiles for tile in some]
    unseen = max(end for _, end in spans), dk.shape[2]  # keys after the last query that is here
    _cut(dk, unseen).zero_()
    _cut(dv, unseen).zero_()
    sums = [_Parts(spans, _turn_back(turning, target)) for target in (dk, dv)]
    for (row, place, n), some in zip(queries, tiles, strict=True):
        grad, out, lse, q, dq = (_cut(x, (row, row + n)) for x in rows)
        sum_q = _Parts([tile.rows for tile in some], _turn_back(turning, dq, place))
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
                total.add(span, (by, _mirror(part, tile)))


def _turn_back(
    turning: Turning, target: Tensor, first: int = 0
) -> Callable[[Span, Sequence[tuple[Span, tuple[int | None, Tensor]]]], None]:
    """Return what writes a stretch of a gradient ``[b, h, n, d]``, of the places from ``first`` on.

    A part of it is the frame that it is to be turned back by, if any, and the tensor.
    """

    def write(stretch: Span, parts: Sequence[tuple[Span, tuple[int | None, Tensor]]]) -> None:
        grads = [(frame, _cut(grad, stretch, span[0])) for span, (frame, grad) in parts]
        turning.turn_back(grads, stretch[0], _cut(target, stretch, first))

    return write


class _Parts[Part]:
    """What tiles give to tokens.

    A stretch of tokens is finished when its last part is there, so that few of them are held.

    Args:
        spans: places of all parts that will be added.
        finish: called with a stretch and the parts that it is in, each with its span.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        finish: Callable[[Span, Sequence[tuple[Span, Part]]], None],
    ) -> None:
        edges = sorted({edge for span in spans for edge in span})
        self._missing = {
            stretch: count
            for stretch in pairwise(edges)
            if (count := sum(_holds(span, stretch) for span in spans))
        }
        self._parts: dict[Span, list[tuple[Span, Part]]] = {x: [] for x in self._missing}
        self._finish = finish

    def add(self, span: Span, part: Part) -> None:
        """Add a part."""
        for stretch in [stretch for stretch in self._missing if _holds(span, stretch)]:
            self._parts[stretch].append((span, part))
            self._missing[stretch] -= 1
            if not self._missing[stretch]:
                del self._missing[stretch]
                self._finish(stretch, self._parts.pop(stretch))


def _holds(span: Span, stretch: Span) -> bool:
    return span[0] <= stretch[0] and stretch[1] <= span[1]


def _cut(x: Tensor, span: Span, first: int = 0) -> Tensor:
    """Return the tokens of ``span`` of a tensor whose first token is ``first``."""
    return x.narrow(2, span[0] - first, span[1] - span[0])


def _blocks(x: Tensor, span: Span, tile: Tile, first: int = 0) -> Tensor:
    """Return ``span`` and the same of all tiles that one stands for, as a batch ``[count, ...]``.

    Where they are several, x is one sample, of which this is a view.
    """
    if tile.count == 1:
        return _cut(x, span, first)
    whole = _cut(x, (span[0], span[1] + (tile.count - 1) * tile.step), first)
    blocks = whole.unfold(2, span[1] - span[0], tile.step).movedim(2, 0).squeeze(1)
    return blocks.movedim(-1, 2)


def _mirror(x: Tensor, tile: Tile) -> Tensor:
    return x.flip(2) if tile.shape is TileShape.ANTICAUSAL else x


def _empty(like: Tensor) -> Tensor:
    b, h, n, d = like.shape
    return like.new_empty(n, b, h, d).permute(1, 2, 0, 3)


def _laid_out(x: Tensor) -> Tensor:
    """Return ``[b, h, n, d]`` that lies as ``[n, b, h, d]``."""
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
