# SPDX-License-Identifier: Apache-2.0
"""One task on one model: cases made, scored and written, continued where they were killed."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_cream.evaluation import published_cases
from megatron_cream.evaluation.forward import Model
from megatron_cream.evaluation.haystacks import Haystack, Kit
from megatron_cream.evaluation.progress import finish, progress_bar, settings, weighed
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.result_files import CASES, NUMBER_CASES, Record
from megatron_cream.evaluation.results import case_results
from megatron_cream.evaluation.scoring import CaseScore, Job, jobs, make_pass, read_scores
from megatron_cream.evaluation.store import Store
from megatron_cream.evaluation.tasks import TASKS

_SHOT_SEED = 1_000_000  # far from the seeds of cases


def score_cases(
    args: Namespace, model: Model, prompt: Prompt, task: str, folder: str | None
) -> dict[str, Any]:
    """Score one task and return its results; write them if there is a folder."""
    kept = case_settings(args, model, task, prompt)
    haystacks = make_haystacks(args, prompt, task)
    kind = TASKS[task]
    with Store(folder, kept, NUMBER_CASES if kind.number else CASES, model.primary) as store:
        _score_haystacks(args, model, task, prompt, haystacks, store)
        result = kept | case_results(store.finished, args.cases, kind.number, kind.placed)
        finish(store, result)
    return result


def case_settings(args: Namespace, model: Model, task: str, prompt: Prompt) -> dict[str, Any]:
    """Return what decides the cases of a task and their scores."""
    return settings(args, model, task) | {
        "tokenizer": prompt.tokenizer.name,
        "prompt": args.prompt,
        "bos": prompt.bos,
        "shots": args.shots,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "cases": args.cases,
        "cases_file": args.cases_file,
        "cases_file_content": args.cases_file and published_cases.content(args.cases_file),
        "most_tokens": args.most_tokens,
    }


def make_haystacks(args: Namespace, prompt: Prompt, task: str) -> list[Haystack]:
    """Return all cases of a run, shortest first.

    Raises:
        ValueError: a task that does not fit a length, or a file that is not of the task.
    """
    kit = _kit(args, prompt, task)
    if args.cases_file is not None:
        return published_cases.read_haystacks(task, args.cases_file, kit, args.seeds, args.cases)
    return _drawn(args, kit, task, args.lengths)


def check_fit(args: Namespace, prompt: Prompt, task: str) -> list[int]:
    """Return the lengths of a task's cases, if there are such cases.

    Raises:
        UserError: a length that is too short for the task, or a file that is not of the task.
    """
    kind = TASKS[task]
    kit = _kit(args, prompt, task)
    if args.cases_file is not None:
        made = published_cases.read_haystacks(task, args.cases_file, kit, args.seeds, args.cases)
        return [made[0].length]
    # What fits a length fits longer ones too, but for those that a task asks more of.
    reached = [[n for n in args.lengths if n >= least] for least in (1, *kind.harder_from)]
    _drawn(args, kit, task, sorted({found[0] for found in reached if found}))
    return args.lengths


def _drawn(args: Namespace, kit: Kit, task: str, lengths: Iterable[int]) -> list[Haystack]:
    kind, made = TASKS[task], []
    for length in lengths:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        groups = (_numbered(kind.make(kit, length, seed, args.cases)) for seed in seeds)
        if not kind.placed:  # each case is a haystack, and none of them is needed for the others
            groups = ([one] for group in groups for one in group)
        made += affordable(groups, args.most_tokens)
    return made


def _kit(args: Namespace, prompt: Prompt, task: str) -> Kit:
    return Kit(prompt, [TASKS[task].shot(_SHOT_SEED + i) for i in range(args.shots)])


def _numbered(haystacks: list[Haystack]) -> list[Haystack]:
    return [dataclasses.replace(one, number=i) for i, one in enumerate(haystacks)]


def affordable(groups: Iterable[list[Haystack]], most: int | None) -> list[Haystack]:
    """Return the first groups of haystacks that together have at most ``most`` tokens.

    The first group is always among them; None stands for no limit. Groups beyond the limit are
    not made.
    """
    taken: list[Haystack] = []
    for group in groups:
        tokens = sum(one.length for one in (*taken, *group))
        if taken and most is not None and tokens > most:
            break
        taken += group
    return taken


def _score_haystacks(
    args: Namespace,
    model: Model,
    task: str,
    prompt: Prompt,
    haystacks: list[Haystack],
    store: Store,
) -> None:
    done = {CASES.identity(record) for record in store.finished}
    every = list(jobs(haystacks, args.batch_tokens, model.shares_context))
    known = {case for job in every for case in _cases(job)}
    store.refuse_foreign({one.length for one in haystacks}, known)
    left = [job for job in every if any(case not in done for case in _cases(job))]
    with progress_bar(task, sum(map(_work, every)), model.primary) as bar:
        bar.update(bar.total - sum(map(_work, left)))
        for length in sorted({job.haystacks[0].length for job in left}):
            model.set_length(length)
            same = [job for job in left if job.haystacks[0].length == length]
            for job, scores in zip(same, model.run(map(make_pass, same)), strict=True):
                found = [_record(score, task, prompt) for score in read_scores(job, scores)]
                store.add([record for record in found if CASES.identity(record) not in done])
                bar.update(_work(job))


def _cases(job: Job) -> Iterator[tuple[int, ...]]:
    for one in job.haystacks:
        for index in job.chosen:
            yield one.length, one.seed, one.number, index


def _record(score: CaseScore, task: str, prompt: Prompt) -> Record:
    record = dataclasses.asdict(score)
    behind = record.pop("next")
    if TASKS[task].number:
        # The first integer of the answer is the gold one if no digit follows it.
        goes_on = prompt.tokenizer.decode([behind])[:1].isdigit()
        record["number"] = score.hit and not goes_on
    return record


def _work(job: Job) -> int:
    return weighed(job.cost, job.haystacks[0].length)
