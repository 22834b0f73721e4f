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
from megatron_cream.evaluation.haystacks import CaseTail, HaystackBuilder, HaystackCases
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.result_files import CASE_RECORDS, NUMBER_CASE_RECORDS
from megatron_cream.evaluation.results import case_results
from megatron_cream.evaluation.store import ResultStore, open_store

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


def score_cases(
    settings: EvaluationSettings, model: ScoringModel, prompt: Prompt, task: str
) -> dict[str, Any]:
    """Score one task and return its results; write them if there is a folder.

    A run that was killed is continued: cases that the folder has are not scored again.
    """
    kind = TASKS[task]
    haystacks = make_haystacks(settings, prompt, task)
    records = NUMBER_CASE_RECORDS if kind.number else CASE_RECORDS
    decisive = _case_settings(settings, prompt)
    with open_store(settings, model, task, decisive, records) as store:
        batches = list(make_batches(haystacks, settings.batch_tokens, model.shares_context))
        known = {case for batch in batches for case in batch.cases()}
        store.validate_finished({one.length for one in haystacks}, known)
        _score_batches(model, task, prompt, batches, store)
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


def _score_batches(
    model: ScoringModel, task: str, prompt: Prompt, batches: list[ScoringBatch], store: ResultStore
) -> None:
    done = store.done
    left = [batch for batch in batches if any(case not in done for case in batch.cases())]
    with progress_bar(task, sum(batch.work for batch in batches), model.primary) as bar:
        bar.update(bar.total - sum(batch.work for batch in left))
        for length in sorted({batch.haystacks[0].length for batch in left}):
            model.set_length(length)
            same = [batch for batch in left if batch.haystacks[0].length == length]
            for batch, scores in zip(same, model.run(map(make_pass, same)), strict=True):
                found = [_record(score, task, prompt) for score in read_scores(batch, scores)]
                store.add([record for record in found if CASE_RECORDS.identity(record) not in done])
                bar.update(batch.work)


def _record(score: CaseScore, task: str, prompt: Prompt) -> dict[str, Any]:
    record = dataclasses.asdict(score)
    after = record.pop("next")
    if TASKS[task].number:
        # The first integer of the answer is the gold one if no digit follows it.
        goes_on = prompt.tokenizer.decode([after])[:1].isdigit()
        record["number"] = score.hit and not goes_on
    return record


def make_haystacks(settings: EvaluationSettings, prompt: Prompt, task: str) -> list[HaystackCases]:
    """Return all cases of a run, shortest first.

    Raises:
        UserError: a task that does not fit a length, or a file that is not of the task.
    """
    builder = _builder(settings, prompt, task)
    if settings.cases_file is not None:
        return read_haystacks(
            task,
            settings.cases_file,
            builder,
            settings.seeds,
            settings.cases,
            settings.query_aware,
        )
    return _draw(settings, builder, task, settings.lengths)


def validate_fit(settings: EvaluationSettings, prompt: Prompt, task: str) -> Sequence[int]:
    """Return the lengths of a task's cases, if there are such cases.

    Raises:
        UserError: a length that is too short for the task, or a file that is not of the task.
    """
    if settings.cases_file is not None:
        return [make_haystacks(settings, prompt, task)[0].length]
    # What fits a length fits longer ones too, but for those that a task asks more of.
    lengths = settings.lengths
    reached = [[n for n in lengths if n >= least] for least in (1, *TASKS[task].harder_from)]
    shortest = sorted({found[0] for found in reached if found})
    _draw(settings, _builder(settings, prompt, task), task, shortest)
    return lengths


def _builder(settings: EvaluationSettings, prompt: Prompt, task: str) -> HaystackBuilder:
    return HaystackBuilder(
        prompt, [TASKS[task].shot(_SHOT_SEED + i) for i in range(settings.shots)]
    )


def _draw(
    settings: EvaluationSettings, builder: HaystackBuilder, task: str, lengths: Iterable[int]
) -> list[HaystackCases]:
    kind, made = TASKS[task], []
    for length in lengths:
        seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
        how = settings.cases, settings.records_of, settings.query_aware
        groups: Iterable[list[HaystackCases]] = (
            kind.make(builder, length, seed, *how) for seed in seeds
        )
        if not kind.placed:  # each case is a haystack, and none of them is needed for the others
            groups = ([one] for group in groups for one in group)
        made += take_within(groups, settings.most_tokens)
    return made


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
