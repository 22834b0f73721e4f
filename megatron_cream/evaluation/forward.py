# SPDX-License-Identifier: Apache-2.0
"""One forward pass: which tokens go in, who sees whom, and which predictions come out.

A pass holds a context and any number of tails that each continue it. Tails stand at the same
positions and do not see each other, so that each is scored as if the context stood before it
alone; the context, nearly all of the work, is computed once. Nothing takes memory of O(n^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

_MOST_LOGITS = 2**26  # float32 values of logits held at once, 256 MiB

# (number of tails, tokens of each) of the pass that is running.
_tails: ContextVar[tuple[int, int]] = ContextVar("tails", default=(0, 0))
# Which keys each sample of ``attend_from_last`` sees.
_seen: ContextVar[KeysSeen | None] = ContextVar("seen", default=None)
# What keeps keys and values of a text that is being written.
_keeper: ContextVar[KeyKeeper | None] = ContextVar("keeper", default=None)


@dataclass(frozen=True)
class ForwardPass:
    """Input of a forward pass of b samples of the same shape.

    Attributes:
        tokens: int64 ``[b, n]``, a context of ``n - tails * tail`` tokens, then the tails.
        rows: int64 ``[r]``, which of the n places predict something that is asked for.
        targets: int64 ``[b, r]``, the token that ought to follow each of ``rows``.
        tails: number of tails; none for plain text.
        tail: tokens of each tail.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    tails: int = 0
    tail: int = 0

    @property
    def context(self) -> int:
        """Tokens that all tails continue."""
        return self.tokens.shape[1] - self.tails * self.tail

    def positions(self) -> Tensor:
        """Position ids ``[b, n]``: plain, and every tail directly after the context."""
        context = torch.arange(self.context)
        tail = self.context + torch.arange(self.tail)
        return torch.cat([context, tail.repeat(self.tails)]).expand_as(self.tokens)


@dataclass(frozen=True)
class PassScores:
    """What a pass answers, on the CPU.

    Attributes:
        logprobs: float64 ``[b, r]``, natural logarithm of the probability of each target.
        best: int64 ``[b, r]``, the most likely token, what greedy decoding would take.
    """

    logprobs: Tensor
    best: Tensor


class ScoringModel(Protocol):
    """A model to score with, on one process or as this rank's part of one.

    Attributes:
        name: the folder that it came from.
        window: tokens that it was trained or extended to.
        vocabulary: tokens that it knows, without padding rows of its output layer.
        shares_context: whether a pass may have more than one tail.
        stop_tokens: tokens that end what it writes, by its own files; empty if they say none.
        primary: whether this process writes the results.
        settings: what decides its answers besides its weights, for the result file.
    """

    name: str
    window: int
    vocabulary: int
    shares_context: bool
    stop_tokens: tuple[int, ...]
    primary: bool
    settings: dict[str, Any]

    def set_length(self, length: int) -> None:
        """Set angles for sequences of ``length`` tokens, where they depend on it."""
        ...

    def run(self, passes: Iterator[ForwardPass]) -> Iterator[PassScores]:
        """Answer passes in order; each rank of a model must be given the same ones."""
        ...

    def generate(
        self, prompts: Sequence[np.ndarray], new_tokens: Sequence[int], stop: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Yield what greedy decoding writes after each prompt ``[n]``, in order.

        At most as many tokens as ``new_tokens`` says of each, without the one of ``stop`` that ends
        them.
        """
        for prompt, most in zip(prompts, new_tokens, strict=True):
            written = takewhile(lambda token: token not in stop, self.write(prompt, most))
            yield np.fromiter(written, np.int64)

    def write(self, prompt: np.ndarray, most: int) -> Iterator[int]:
        """Yield up to ``most`` tokens that greedy decoding writes after a prompt ``[n]``.

        A model that keeps no keys and values runs a pass over all for each token: slow, and exact
        at any layout.
        """
        tokens = prompt.astype(np.int64)
        for _ in range(most):
            last = torch.tensor([len(tokens) - 1])
            one = ForwardPass(torch.from_numpy(tokens)[None], last, torch.zeros(1, 1).long())
            (scores,) = self.run(iter([one]))
            yield int(scores.best)
            tokens = np.append(tokens, int(scores.best))


@contextmanager
def tails(count: int, tokens: int) -> Iterator[None]:
    """Have ``attend`` take the last ``count * tokens`` tokens for tails."""
    before = _tails.set((count, tokens))
    try:
        yield
    finally:
        _tails.reset(before)


class KeysSeen:
    """Which keys each of b sequences sees while tokens are written after all of them.

    Args:
        lengths: tokens of each prompt; all end in front of column ``longest`` of the keys.
        size: columns of the keys.
    """

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device | str) -> None:
        self.tokens = max(lengths)
        starts = self.tokens - torch.tensor(lengths, device=device)
        columns = torch.arange(size, device=device)
        self._seen = (columns >= starts[:, None]) & (columns < self.tokens)
        self._bias: Tensor | None = None

    def see_next(self) -> None:
        """Let every sequence see one column more."""
        self._seen[:, self.tokens] = True
        if self._bias is not None:
            self._bias[:, self.tokens] = 0
        self.tokens += 1

    @property
    def mask(self) -> Tensor:
        """What is seen of the columns that have keys, bool ``[b, tokens]``."""
        return self._seen[:, : self.tokens]

    def bias(self, groups: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to logits, ``[b * groups, size]``: 0, or next to the least number.

        It is finite: a part of the keys of which nothing is seen must not divide 0 by 0.
        """
        if self._bias is None:
            unseen = torch.zeros(self._seen.shape, dtype=dtype, device=self._seen.device)
            unseen.masked_fill_(~self._seen, torch.finfo(dtype).min / 4)
            self._bias = unseen.repeat_interleave(groups, dim=0)
        return self._bias


@contextmanager
def seeing(keys: KeysSeen) -> Iterator[None]:
    """Have ``attend_from_last`` see these keys of those that it is given."""
    before = _seen.set(keys)
    try:
        yield
    finally:
        _seen.reset(before)


class KeyKeeper(Protocol):
    """Keeps keys and values of what was read, per layer."""

    def update(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what is new ``[b, g, n, d]``; return keys and values to attend to."""
        ...


@contextmanager
def keeping(keeper: KeyKeeper) -> Iterator[None]:
    """Have ``keep`` hand keys and values to ``keeper``."""
    before = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(before)


def keep(layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[b, g, m, d]`` to attend to: kept ones, where a text is written."""
    keeper = _keeper.get()
    return (key, value) if keeper is None else keeper.update(layer, key, value)


def running_tails() -> tuple[int, int]:
    """Return the number of tails of the pass that is running, and the tokens of each."""
    return _tails.get()


def seen_keys() -> KeysSeen | None:
    """Return the keys of ``seeing``."""
    return _seen.get()


def attend_from_last(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention ``[b, h, 1, d]`` of the last token to itself and to all before it.

    Query heads that share keys and values ``[b, g, n, d]`` are rows of one product with them, so
    that these are neither copied nor read once per head.
    """
    batch, heads, _, dim = query.shape
    groups, tokens = key.shape[1:3]
    rows = query.reshape(batch, groups, heads // groups, dim)
    if (seen := _seen.get()) is None:
        found = scaled_dot_product_attention(rows, key, value, scale=scale)
        return found.reshape(batch, heads, 1, dim)
    bias = seen.bias(groups, query.dtype)
    splits = _splits(batch * groups, tokens, query.device)
    if splits == 1:
        mask = bias.view(batch, groups, 1, tokens).expand(-1, -1, rows.shape[2], -1)
        found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        return found.reshape(batch, heads, 1, dim)
    # The parts of the keys stand where heads do; each has a softmax of its own, and its sum.
    parts = key.view(batch * groups, splits, -1, dim), value.view(batch * groups, splits, -1, dim)
    asked = rows.reshape(batch * groups, 1, -1, dim).expand(-1, splits, -1, -1).contiguous()
    mask = bias.view(batch * groups, splits, 1, -1).expand(-1, -1, asked.shape[2], -1)
    found, sums = _attention_and_log_sums(asked, *parts, mask, scale)
    weights = sums.softmax(dim=1)[..., None]
    return (found.float() * weights).sum(1).to(query.dtype).reshape(batch, heads, 1, dim)


KEYS_MULTIPLE = 512
"""The keys of ``attend_from_last`` are of a multiple of so many tokens, so that they can be cut."""


def _splits(sequences: int, tokens: int, device: torch.device) -> int:
    """Return into how many parts keys are cut, so that all of a GPU has something to do.

    A program of attention reads all keys of a sequence, and few sequences are few programs.
    """
    if device.type != "cuda":
        return 1
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while splits < 32 and splits * sequences < programs and tokens // splits > 2048:
        splits *= 2
    return splits


def _attention_and_log_sums(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention ``[b, h, n, d]``, and the logarithm of its sum of exponentials (float32)."""
    aten = torch.ops.aten
    if query.device.type == "cuda":
        found, sums, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=scale
        )
    else:
        found, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    return found, sums[:, :, : query.shape[2]].float()


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention ``[b, h, n, d]``; keys and values ``[b, g, n, d]`` may have fewer heads.

    One query with more keys is the last token of a text that is being written. The context attends
    causally, without a mask. The tails' mask is ``[k * t, n]``: linear in n, since tails are short.
    """
    if query.shape[2] == 1 < key.shape[2]:
        return attend_from_last(query, key, value, scale)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    count, tokens = _tails.get()
    if count < 2:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    context = query.shape[2] - count * tokens
    inside = slice(None), slice(None), slice(context)
    before = scaled_dot_product_attention(
        query[inside], key[inside], value[inside], is_causal=True, scale=scale
    )
    mask = tail_mask(context, count, tokens, query.device, query.dtype)
    after = scaled_dot_product_attention(
        query[:, :, context:], key, value, attn_mask=mask, scale=scale
    )
    return torch.cat([before, after], dim=2)


@lru_cache(maxsize=1)  # all layers of a pass ask for the same one
def tail_mask(
    context: int, count: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return what is added to logits ``[count * tokens, context + count * tokens]``: 0 or -inf.

    A tail sees the context and, causally, itself.
    """
    inside = torch.full((tokens, tokens), -torch.inf, device=device, dtype=dtype).triu(1)
    mask = torch.full((count * tokens,) * 2, -torch.inf, device=device, dtype=dtype)
    for i in range(count):
        own = slice(i * tokens, (i + 1) * tokens)
        mask[own, own] = inside
    seen = torch.zeros(count * tokens, context, device=device, dtype=dtype)
    return torch.cat([seen, mask], dim=1)


def score_rows(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocabulary: int,
    shard: int = 0,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (float64) and arg-max ``[r]`` for hidden states ``[r, h]``.

    Args:
        logits_of: hidden states ``[q, h]`` to this rank's logits ``[q, v]``, the tokens
            ``shard * v .. (shard + 1) * v - 1`` of a vocabulary that may be split over ranks.
        targets: int64 ``[r]``.
        vocabulary: tokens that count; logits of the padding after them are left out.
        group: the ranks that hold the shards; None where there is one.
    """
    probe = logits_of(hidden[:1])
    size = max(1, _MOST_LOGITS // probe.shape[-1])
    found = [
        _score_logits(logits_of(rows), wanted, vocabulary, shard, group)
        for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logprobs, best = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(best)


def _score_logits(
    logits: Tensor, targets: Tensor, vocabulary: int, shard: int, group: Any
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    size = logits.shape[-1]
    first = shard * size
    logits[:, max(0, vocabulary - first) :] = -torch.inf
    highest, best = logits.max(dim=-1)
    top = _reduce(highest.clone(), "MAX", group)
    # A rank whose best is not the best of all answers with an id after the vocabulary.
    best = _reduce(torch.where(highest == top, best + first, vocabulary), "MIN", group)
    local = targets - first
    here = (local >= 0) & (local < size)
    own = logits.gather(1, local.clamp(0, size - 1)[:, None])[:, 0].double()
    wanted = _reduce(torch.where(here, own, 0.0), "SUM", group)
    # In place: another array of this size costs as much time as the output layer.
    total = _reduce(logits.sub_(top[:, None]).exp_().sum(-1).double(), "SUM", group)
    return wanted - top.double() - total.log(), best


def _reduce(value: Tensor, how: str, group: Any) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, how), group)
    return value


def weigh_tokens(tokens: int, length: int) -> int:
    """Return tokens as the time they take: attention makes those of long sequences dearer."""
    return int(tokens * (1 + length / 8192))


def progress_bar(title: str, total: int, shown: bool) -> tqdm:
    """Return a bar with the time left, over a ``total`` that ``weigh_tokens`` counts."""
    return tqdm(
        total=total,
        desc=title,
        disable=not shown,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
    )
