# SPDX-License-Identifier: Apache-2.0
"""Has a model answer RULER's cases, greedily as RULER does, and scores what it writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ScoringModel, progress_bar, weigh_tokens
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.result_files import RULER_RECORDS
from megatron_cream.evaluation.ruler.materials import QuestionSet
from megatron_cream.evaluation.ruler.sampler import RulerCase
from megatron_cream.evaluation.store import ResultStore, open_store

RulerCases = dict[tuple[int, str], list[RulerCase]]
"""Length and task to its cases, by length and then in RULER's order of tasks."""


def open_cases(settings: EvaluationSettings, prompt: Prompt) -> RulerCases:
    """Return all cases of a run.

    Raises:
        UserError, OSError: a file that a task needs is missing or of another form, or a length is
            too short for a task.
    """
    materials = read_materials(settings)
    tasks = _tasks(settings, materials)
    template = ruler.MODEL_TEMPLATES.get(settings.prompt, prompt.model_template)

    def count(text: str) -> int:
        return len(prompt.tokenizer.encode([text])[0])

    made: RulerCases = {}
    works = {length: weigh_tokens(length, length) for length in settings.lengths}
    total, shown = len(tasks) * sum(works.values()), os.environ.get("RANK", "0") == "0"
    with progress_bar("making cases", total, shown) as bar:
        for length in settings.lengths:
            for task in tasks:
                made[length, task] = ruler.make_cases(
                    task, length, settings.samples, count, materials, template
                )
                bar.update(works[length])
    return made


def read_materials(settings: EvaluationSettings) -> ruler.Materials:
    """Read the files of --haystack, --qa and --words.

    Raises:
        UserError, OSError: a file of another form, or two of --qa in the same.
    """
    questions: dict[str, QuestionSet] = {}
    for path in settings.qa or ():
        kind, found = ruler.read_questions(path)
        if kind in questions:
            form = {"squad": "SQuAD", "hotpot": "HotpotQA"}[kind]
            raise UserError(f"--qa has {path}: there must be one file in {form}'s form, not two")
        questions[kind] = found
    return ruler.Materials(
        ruler.read_haystack(settings.haystack) if settings.haystack is not None else [],
        questions.get("squad"),
        questions.get("hotpot"),
        ruler.read_words(settings.words) if settings.words is not None else [],
    )


def _tasks(settings: EvaluationSettings, materials: ruler.Materials) -> list[str]:
    """Return the tasks that are asked for, by default those with all files, in RULER's order.

    Raises:
        UserError: no such task, or one whose file is not given.
    """
    if settings.ruler_tasks is None:
        return ruler.available(materials)
    for task in settings.ruler_tasks:
        ruler.validate_material(task, materials)
    return [task for task in ruler.TASKS if task in settings.ruler_tasks]


def score_ruler(
    settings: EvaluationSettings, model: ScoringModel, prompt: Prompt, cases: RulerCases
) -> dict[str, Any]:
    """Have every case answered and return the results; write them if there is a folder.

    A run that was killed is continued: cases that the folder has are not answered again.
    """
    tasks = list(dict.fromkeys(task for _, task in cases))
    decisive = _ruler_settings(settings, prompt, tasks)
    with open_store(settings, model, "ruler", decisive, RULER_RECORDS) as store:
        known = {(*key, index) for key in cases for index in range(settings.samples)}
        store.validate_finished(set(settings.lengths), known)
        _answer_cases(model, prompt, cases, store)
        return store.finish(
            ruler_results(store.finished, tasks, settings.samples, settings.threshold)
        )


def _ruler_settings(
    settings: EvaluationSettings, prompt: Prompt, tasks: list[str]
) -> dict[str, Any]:
    """Return what decides the cases of a run; a file by its content as well."""
    files = {
        "haystack": settings.haystack,
        "qa": settings.qa and list(settings.qa),
        "words": settings.words,
    }
    return {
        "tokenizer": prompt.tokenizer.name,
        "prompt": settings.prompt,
        "bos": prompt.bos,
        "samples": settings.samples,
        "ruler_tasks": tasks,
        **files,
        **{
            f"{name}_content": given and _content([given] if isinstance(given, str) else given)
            for name, given in files.items()
        },
    }


def _content(paths: Iterable[str]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return found.hexdigest()[:16]


def _answer_cases(
    model: ScoringModel, prompt: Prompt, cases: RulerCases, store: ResultStore
) -> None:
    done = store.done
    eod = prompt.tokenizer.eod
    stop = model.stop_tokens or (() if eod is None else (eod,))
    work = {length: weigh_tokens(length, length) for length, _ in cases}
    total = sum(work[length] * len(own) for (length, _), own in cases.items())
    with progress_bar("ruler", total, model.primary) as bar:
        for (length, task), own in cases.items():
            model.set_length(length)
            left = [i for i in range(len(own)) if (length, task, i) not in done]
            bar.update(work[length] * (len(own) - len(left)))
            prompts = [encode_case(prompt, own[i]) for i in left]
            answers = model.generate(prompts, ruler.new_tokens(task), stop)
            for index, tokens in zip(left, answers, strict=True):
                # Rows of the output layer that only pad the vocabulary are no token of a text.
                written = prompt.tokenizer.decode(tokens[tokens < prompt.tokenizer.vocab_size])
                record = {
                    "length": length,
                    "task": task,
                    "index": index,
                    "score": ruler.score_case(task, written, own[index].answers),
                    "written": written,
                    "answers": list(own[index].answers),
                    "written_tokens": len(tokens),
                    "case_tokens": own[index].length,
                }
                store.add([record])
                bar.update(work[length])


def encode_case(prompt: Prompt, case: RulerCase) -> np.ndarray:
    """Return what a model reads, int64 ``[n]``: one text, behind the token that begins a text."""
    tokens = prompt.tokenizer.encode([case.prompt + case.prefix])[0].astype(np.int64)
    if prompt.bos and tokens[0] != prompt.tokenizer.bos:
        tokens = np.concatenate([[prompt.tokenizer.bos], tokens])
    return tokens


def ruler_results(
    records: list[dict[str, Any]], tasks: list[str], samples: int, threshold: float
) -> dict[str, Any]:
    """Return scores by length and task, 0 to 100, and what RULER makes of them.

    A length counts where all of its cases are answered.
    """
    by_length: dict[int, dict[str, list[float]]] = {}
    for one in records:
        by_length.setdefault(one["length"], {}).setdefault(one["task"], []).append(one["score"])
    rows: list[dict[str, Any]] = []
    for length, found in sorted(by_length.items()):
        if {task: len(each) for task, each in found.items()} == dict.fromkeys(tasks, samples):
            scores = {task: ruler.mean_score(found[task]) for task in tasks}
            row = {"length": length, "cases": samples, "average": ruler.average(scores)}
            by_metric = {task: {ruler.metric(task): value} for task, value in scores.items()}
            rows.append({**row, "scores": by_metric})
    averages = {row["length"]: row["average"] for row in rows}
    increasing, decreasing = ruler.weighted_averages(averages)
    return {
        "lengths": rows,
        "weighted_average_increasing": increasing,
        "weighted_average_decreasing": decreasing,
        "threshold": threshold,
        "effective_length": ruler.effective_length(averages, threshold),
    }
