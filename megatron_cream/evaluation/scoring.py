# SPDX-License-Identifier: Apache-2.0
"""Scores one task on one model: cases to passes, answers to scores, each written at once.

Greedy decoding writes exactly the gold answer if and only if every token of it is the arg-max given
the gold tokens before it: the first token that is not would have been written instead. So one
forward pass scores a case, without generation.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, batched
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.evaluation_tasks import TASKS, read_haystacks
from megatron_cream.evaluation.forward import (
    ForwardPass,
    PassScores,
    ScoringModel,
    progress_bar,
    weigh_tokens,
)
from megatron_cream.evaluation.prompts import CaseTail, HaystackBuilder, HaystackCases, Prompt
from megatron_cream.evaluation.result_files import CASE_RECORDS, NUMBER_CASE_RECORDS
from megatron_cream.evaluation.results import Records, effective_count, grouped, wilson
from megatron_cream.evaluation.store import open_store

_MOST_MASK = 2**26  # values of a tail mask
_SHOT_SEED = 1_000_000  # far from the seeds of cases


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
        next: the token that greedy decoding writes after the gold answer.
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
class ScoringBatch:
    """Some questions of haystacks of the same shape: one pass.

    Attributes:
        haystacks: one per row of the pass.
        chosen: indices of the tails in each row.
    """

    haystacks: Sequence[HaystackCases]
    chosen: Sequence[int]

    @property
    def work(self) -> int:
        """Its tokens, as ``weigh_tokens`` counts them."""
        one = self.haystacks[0]
        row = len(one.context) + len(self.chosen) * len(one.tails[0].tokens)
        return weigh_tokens(len(self.haystacks) * row, one.length)

    def cases(self) -> Iterator[tuple[int, ...]]:
        """Yield length, seed, haystack and index of each case."""
        for one in self.haystacks:
            for index in self.chosen:
                yield one.length, one.seed, one.number, index


def make_haystacks(settings: EvaluationSettings, prompt: Prompt, task: str) -> list[HaystackCases]:
    """Return all cases of a task, shortest first.

    Raises:
        UserError: a task that does not fit a length, or a file that is not of the task.
    """
    kind = TASKS[task]
    shots = [kind.shot(_SHOT_SEED + i) for i in range(settings.shots)]
    builder = HaystackBuilder(prompt, shots)
    if (path := settings.cases_file) is not None:
        limits = settings.seeds, settings.cases
        return read_haystacks(task, path, builder, *limits, settings.query_aware)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    how = settings.cases, settings.records_of, settings.query_aware
    made: list[HaystackCases] = []
    for length in settings.lengths:
        groups: Iterable[list[HaystackCases]] = (
            builder.make(kind, length, seed, *how) for seed in seeds
        )
        if not kind.placed:  # each case is a haystack, and none of them is needed for the others
            groups = ([one] for group in groups for one in group)
        made += take_within(groups, settings.most_tokens)
    return made


def score_cases(
    settings: EvaluationSettings,
    model: ScoringModel,
    prompt: Prompt,
    task: str,
    haystacks: Sequence[HaystackCases],
) -> dict[str, Any]:
    """Score a task's haystacks and return the results; write them if there is a folder.

    A run that was killed is continued: cases that the folder has are not scored again.
    """
    kind = TASKS[task]
    records = NUMBER_CASE_RECORDS if kind.number else CASE_RECORDS
    with open_store(settings, model, task, _case_settings(settings, prompt), records) as store:
        batches = list(make_batches(haystacks, settings.batch_tokens, model.shares_context))
        lengths = sorted({one.length for one in haystacks})
        store.validate_finished(set(lengths), {one for batch in batches for one in batch.cases()})
        done = store.done
        left = [batch for batch in batches if not done.issuperset(batch.cases())]
        total, missing = (sum(batch.work for batch in some) for some in (batches, left))
        with progress_bar(task, total, model.primary) as bar:
            bar.update(total - missing)
            for length in lengths:
                model.set_length(length)
                same = [batch for batch in left if batch.haystacks[0].length == length]
                for batch, scores in zip(same, model.run(map(make_pass, same)), strict=True):
                    found = [_record(score, task, prompt) for score in read_scores(batch, scores)]
                    store.add([one for one in found if records.identity(one) not in done])
                    bar.update(batch.work)
        return store.finish(case_results(store.finished, settings.cases, kind.number, kind.placed))


def _case_settings(settings: EvaluationSettings, prompt: Prompt) -> dict[str, Any]:
    """Return what decides the cases of a task."""
    file = settings.cases_file
    return {
        "tokenizer": prompt.tokenizer.name,
        "prompt": settings.prompt,
        "bos": prompt.bos,
        "shots": settings.shots,
        "seeds": settings.seeds,
        "first_seed": settings.first_seed,
        "cases": settings.cases,
        "cases_file": file,
        # A run is not continued with other cases under the same name.
        "cases_file_content": file and hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16],
        "most_tokens": settings.most_tokens,
        **({"records_of": settings.records_of} if settings.records_of else {}),
        **({"query_aware": True} if settings.query_aware else {}),
    }


def _record(score: CaseScore, task: str, prompt: Prompt) -> dict[str, Any]:
    record = dataclasses.asdict(score)
    after = record.pop("next")
    if TASKS[task].number:
        # The first integer of the answer is the gold one if no digit follows it.
        goes_on = prompt.tokenizer.decode([after])[:1].isdigit()
        record["number"] = score.hit and not goes_on
    return record


def take_within(groups: Iterable[list[HaystackCases]], most: int | None) -> list[HaystackCases]:
    """Return the first groups of haystacks that together have at most ``most`` tokens.

    The first group is always among them; None stands for no limit. Groups beyond the limit are
    not made.
    """
    taken: list[HaystackCases] = []
    for group in groups:
        tokens = sum(one.length for one in (*taken, *group))
        if taken and most is not None and tokens > most:
            break
        taken += group
    return taken


def make_batches(
    haystacks: Sequence[HaystackCases], batch_tokens: int, share: bool
) -> Iterator[ScoringBatch]:
    """Cut haystacks into passes of up to ``batch_tokens`` tokens, or of one haystack.

    Args:
        share: whether a pass may have more than one tail.
    """
    groups: dict[tuple[int, int, int], list[HaystackCases]] = {}
    for one in haystacks:
        shape = (len(one.context), len(one.tails[0].tokens), len(one.tails))
        groups.setdefault(shape, []).append(one)
    for (context, tail, count), group in groups.items():
        length = context + tail
        most = max(1, min(_MOST_MASK // length, batch_tokens) // tail) if share else 1
        for chosen in batched(range(count), most):
            rows = max(1, batch_tokens // (context + len(chosen) * tail))
            for some in batched(group, rows):
                yield ScoringBatch(some, chosen)


def make_pass(batch: ScoringBatch) -> ForwardPass:
    """Return the pass of a batch: contexts, their tails; predictions of and after answers."""
    tails = [[one.tails[i] for i in batch.chosen] for one in batch.haystacks]
    rows = [
        np.concatenate([one.context, *(tail.tokens for tail in own)])
        for one, own in zip(batch.haystacks, tails, strict=True)
    ]
    context, size = len(batch.haystacks[0].context), len(tails[0][0].tokens)
    answer = max(len(tail.answer) for own in tails for tail in own)
    ends = context + size * (1 + np.arange(len(batch.chosen)))
    kept = (ends[:, None] - 1 - np.arange(answer, -1, -1)).ravel()
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    # Nothing is known after an answer: its last row asks for no target, and 0 stands there.
    targets = torch.cat([tokens, tokens.new_zeros(len(rows), 1)], dim=1)[:, kept + 1]
    targets.view(len(rows), len(batch.chosen), -1)[:, :, -1] = 0
    return ForwardPass(tokens, torch.from_numpy(kept), targets, len(batch.chosen), size)


def read_scores(batch: ScoringBatch, scores: PassScores) -> Iterator[CaseScore]:
    """Return the score of each case of a batch."""
    shape = len(batch.haystacks), len(batch.chosen), -1
    logprobs, best = (x.view(shape).numpy() for x in (scores.logprobs, scores.best))
    for row, haystack in enumerate(batch.haystacks):
        for column, index in enumerate(batch.chosen):
            tail = haystack.tails[index]
            yield _score(haystack, index, tail, logprobs[row, column], best[row, column])


def _score(
    haystack: HaystackCases, index: int, tail: CaseTail, logprobs: np.ndarray, best: np.ndarray
) -> CaseScore:
    answer = tail.answer
    right = best[-1 - len(answer) : -1] == answer
    ends = accumulate(tail.items)
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


def case_results(cases: Records, places: int, number: bool, placed: bool) -> dict[str, Any]:
    """Return shares by length, and by length and place of the answer.

    Args:
        cases: ``CaseScore`` records.
        places: how many places were asked for, evenly from 0 to 1.
        number: whether the first integer is scored.
        placed: whether answers have places.
    """
    cases = sorted(cases, key=lambda c: (c["length"], c["seed"], c["haystack"], c["index"]))
    result: dict[str, Any] = {
        "lengths": [_shares(group, number) for group in grouped(cases, lambda c: c["length"])]
    }
    if placed:
        steps = max(1, places - 1)
        groups = grouped(cases, lambda c: (c["length"], round(c["where"] * steps) / steps))
        result["places"] = [
            {"where": round(group[0]["where"] * steps) / steps, **_shares(group, number)}
            for group in groups
        ]
    return result


def _shares(cases: Records, number: bool) -> dict[str, Any]:
    hits = [case["hit"] for case in cases]
    share = sum(hits) / len(hits)
    independent = effective_count(hits, [(case["seed"], case["haystack"]) for case in cases])
    low, high = wilson(share, independent)
    found = {
        "length": cases[0]["length"],
        "cases": len(cases),
        "haystacks": len({(case["seed"], case["haystack"]) for case in cases}),
        "hit": share,
        "hit_low": low,
        "hit_high": high,
        "independent_cases": round(independent, 1),
        "items": float(np.mean([case["items"] for case in cases])),
        "tokens": float(np.mean([case["tokens"] for case in cases])),
        "logprob": float(np.mean([case["logprob"] for case in cases])),
        "logprob_per_token": sum(case["logprob"] for case in cases)
        / sum(case["answer_tokens"] for case in cases),
    }
    if number:
        found["number"] = float(np.mean([case["number"] for case in cases]))
    return found
