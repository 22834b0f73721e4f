# SPDX-License-Identifier: Apache-2.0
"""Has a model answer RULER's cases, greedily as RULER does, and scores what it writes."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ScoringModel, progress_bar, weigh_tokens
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.result_files import RULER_RECORDS
from megatron_cream.evaluation.ruler.making import RulerCases
from megatron_cream.evaluation.ruler.sampler import RulerCase
from megatron_cream.evaluation.store import ResultStore, open_store


def score_ruler(
    settings: EvaluationSettings, model: ScoringModel, prompt: Prompt, cases: RulerCases
) -> dict[str, Any]:
    """Have every case answered and return the results; write them if there is a folder.

    A run that was killed is continued: cases that the folder has are not answered again, and it has
    the results of all lengths that were finished.
    """
    tasks = cases.tasks
    decisive = _ruler_settings(settings, prompt, tasks)
    with open_store(settings, model, "ruler", decisive, RULER_RECORDS) as store:
        known = {(*key, index) for key in cases for index in range(cases.samples)}
        store.validate_finished(set(settings.lengths), known)
        for length in _answer_cases(model, prompt, cases, store):
            found = ruler_results(store.finished, tasks, cases.samples, settings.threshold)
            result = store.finish(found, draw=length == settings.lengths[-1])
    return result


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
) -> Iterator[int]:
    """Have the cases of all tasks answered that are not yet; yield each length when it is done."""
    done = store.done
    eod = prompt.tokenizer.eod
    stop = model.stop_tokens or (() if eod is None else (eod,))
    lengths = list(dict.fromkeys(length for length, _ in cases))
    # Those that write most first: a batch writes for as long as one of its cases does.
    tasks = sorted(cases.tasks, key=ruler.new_tokens, reverse=True)
    total = sum(weigh_tokens(n, n) for n in lengths) * len(tasks) * cases.samples
    with progress_bar("ruler", total, model.primary) as bar:
        for length in lengths:
            began = time.monotonic()
            model.set_length(length)
            own = [
                (task, index, one)
                for task in tasks
                for index, one in enumerate(cases[length, task])
            ]
            left = [one for one in own if (length, *one[:2]) not in done]
            waited = time.monotonic() - began
            bar.update(weigh_tokens(length, length) * (len(own) - len(left)))
            new_tokens = [ruler.new_tokens(task) for task, *_ in left]
            answers = model.generate([one.tokens for *_, one in left], new_tokens, stop)
            for (task, index, one), tokens in zip(left, answers, strict=True):
                store.add([_record(prompt.tokenizer, length, task, index, one.case, tokens)])
                bar.update(weigh_tokens(length, length))
            for task in tasks:
                cases.forget((length, task))
            if left and model.primary:
                seconds = time.monotonic() - began
                bar.write(
                    f"{length} tokens: {len(left)} cases in {seconds:.1f} s, {waited:.1f} of "
                    "them until the cases were made",
                    file=sys.stderr,
                )
            yield length


def _record(
    tokenizer: Tokenizer, length: int, task: str, index: int, case: RulerCase, tokens: np.ndarray
) -> dict[str, Any]:
    # Rows of the output layer that only pad the vocabulary are no token of a text.
    written = tokenizer.decode(tokens[tokens < tokenizer.vocab_size])
    return {
        "length": length,
        "task": task,
        "index": index,
        "score": ruler.score_case(task, written, case.answers),
        "written": written,
        "answers": list(case.answers),
        "written_tokens": len(tokens),
        "case_tokens": case.length,
    }


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
