# SPDX-License-Identifier: Apache-2.0
"""Cases to passes, and answers of a model to scores of cases.

Greedy decoding writes exactly the gold answer if and only if every token of it is the arg-max given
the gold tokens before it: the first token that is not would have been written instead. So one
forward pass scores a case, without generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from megatron_cream.evaluation.forward import Pass, Scores
from megatron_cream.evaluation.haystacks import Haystack, Tail

_MOST_MASK = 2**26  # values of a tail mask


@dataclass(frozen=True)
class CaseScore:
    """What a model made of one case.

    Attributes:
        length: tokens of the case, answer included.
        seed, haystack, index: which haystack of the length, and which of its questions.
        where: place of the answer in the context, 0 to 1.
        hit: greedy decoding writes exactly the gold answer.
        items: share of the answer's parts that are right, given the parts before.
        tokens: share of its tokens that are right, given those before.
        logprob: natural logarithm of the probability of the whole answer.
        answer_tokens: their number.
        next: the token that greedy decoding writes behind the gold answer.
    """

    length: int
    seed: int
    haystack: int
    index: int
    where: float
    hit: bool
    items: float
    tokens: float
    logprob: float
    answer_tokens: int
    next: int


@dataclass(frozen=True)
class Job:
    """Some questions of haystacks of the same shape, one pass.

    Attributes:
        haystacks: one a row of the pass.
        chosen: indices of the tails in each row.
    """

    haystacks: list[Haystack]
    chosen: list[int]

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        one = self.haystacks[0]
        tail = len(one.tails[0].tokens)
        return len(self.haystacks) * (len(one.context) + len(self.chosen) * tail)


def jobs(haystacks: Sequence[Haystack], batch_tokens: int, share: bool) -> Iterator[Job]:
    """Cut haystacks into passes of up to ``batch_tokens`` tokens, or of one haystack.

    Args:
        share: whether a pass may have more than one tail.
    """
    for haystack, count in _groups(haystacks):
        tail = len(haystack[0].tails[0].tokens)
        length = haystack[0].length
        most = max(1, min(_MOST_MASK // length, batch_tokens) // tail) if share else 1
        for first in range(0, count, most):
            chosen = list(range(first, min(first + most, count)))
            tokens = length + (len(chosen) - 1) * tail
            rows = max(1, batch_tokens // tokens)
            for start in range(0, len(haystack), rows):
                yield Job(haystack[start : start + rows], chosen)


def _groups(haystacks: Sequence[Haystack]) -> Iterator[tuple[list[Haystack], int]]:
    """Haystacks of one shape, in order of their first one."""
    found: dict[tuple[int, int, int], list[Haystack]] = {}
    for one in haystacks:
        shape = (len(one.context), len(one.tails[0].tokens), len(one.tails))
        found.setdefault(shape, []).append(one)
    for (_, _, count), group in found.items():
        yield group, count


def make_pass(job: Job) -> Pass:
    """Return the pass of a job: contexts, then their tails; predictions of and behind answers."""
    tails = [[one.tails[i] for i in job.chosen] for one in job.haystacks]
    rows = [
        np.concatenate([one.context, *(tail.tokens for tail in own)])
        for one, own in zip(job.haystacks, tails, strict=True)
    ]
    context, size = len(job.haystacks[0].context), len(tails[0][0].tokens)
    answer = max(len(tail.answer) for own in tails for tail in own)
    ends = context + size * (1 + np.arange(len(job.chosen)))
    kept = (ends[:, None] - 1 - np.arange(answer, -1, -1)).ravel()
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    # Nothing is known behind an answer: its last row asks for no target, and 0 stands in.
    behind = torch.cat([tokens, tokens.new_zeros(len(rows), 1)], dim=1)
    targets = behind[:, kept + 1]
    targets.view(len(rows), len(job.chosen), -1)[:, :, -1] = 0
    return Pass(tokens, torch.from_numpy(kept), targets, len(job.chosen), size)


def read_scores(job: Job, scores: Scores) -> Iterator[CaseScore]:
    """Return the score of each case of a job."""
    count = len(job.chosen)
    logprobs = scores.logprobs.view(len(job.haystacks), count, -1).numpy()
    best = scores.best.view(len(job.haystacks), count, -1).numpy()
    for row, haystack in enumerate(job.haystacks):
        for column, index in enumerate(job.chosen):
            tail = haystack.tails[index]
            yield _score(haystack, index, tail, logprobs[row, column], best[row, column])


def _score(
    haystack: Haystack, index: int, tail: Tail, logprobs: np.ndarray, best: np.ndarray
) -> CaseScore:
    answer = tail.answer
    right = best[-1 - len(answer) : -1] == answer
    ends = list(accumulate(tail.items))
    items = [bool(right[end - n : end].all()) for end, n in zip(ends, tail.items, strict=True)]
    return CaseScore(
        length=haystack.length,
        seed=haystack.seed,
        haystack=haystack.number,
        index=index,
        where=round(tail.where, 4),
        hit=bool(right.all()),
        items=sum(items) / len(items),
        tokens=float(right.mean()),
        logprob=float(logprobs[-1 - len(answer) : -1].sum()),
        answer_tokens=len(answer),
        next=int(best[-1]),
    )
