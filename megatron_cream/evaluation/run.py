# SPDX-License-Identifier: Apache-2.0
"""Evaluates one model on the tasks that are asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ScoringModel
from megatron_cream.evaluation.longppl import score_longppl
from megatron_cream.evaluation.open_model import (
    open_documents,
    open_model,
    open_prompt,
    validate_vocabulary,
)
from megatron_cream.evaluation.perplexity import score_perplexity
from megatron_cream.evaluation.pictures import draw_suite, note_missing_matplotlib
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.results import PER_DOCUMENT, suite_table, table
from megatron_cream.evaluation.ruler.answers import open_cases, score_ruler
from megatron_cream.evaluation.scoring import score_cases, validate_fit
from megatron_cream.evaluation.store import write_whole
from megatron_cream.positions.plots import has_matplotlib


def evaluate(settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Evaluate a checkpoint or a Hugging Face folder on long text.

        evaluate(EvaluationSettings(["passkey", "needle"], hf="model/", lengths=[4096, 16384]))

    With ``output`` every task has a folder: OUTPUT itself for one task, OUTPUT/TASK for several.
    It gets result.json, table.md, picture.png and every finished case at once, so that a run that
    was killed goes on where it was.

    Args:
        settings: tasks, the model, lengths in tokens, and where results go.

    Returns:
        one result per task, in order, as in result.json: ``lengths`` has a row per context length
        in tokens. Of perplexity that is ``perplexity``, and ``nll`` in nats per token with
        ``document_nll`` ``[documents]``, and of longppl ``longppl`` too; of other tasks shares from
        0 to 1, of exact answers (``hit``), parts of answers (``items``) and tokens, with 95 %
        intervals (``hit_low``, ``hit_high``), and the log-likelihood of the answer in nats
        (``logprob_per_token``); of ruler ``scores`` by task and metric and their ``average``, from
        0 to 100. Only the first rank has them; others return no result.

    Raises:
        UserError: settings that do not go together, or a model, tokenizer or data that do not.
        OSError: a file that is missing, or a folder that another run writes to.
        ImportError: transformers is not installed, or what a tokenizer needs.
    """
    if settings.cpu and settings.checkpoint is not None:
        from megatron_cream.mcore import cpu

        cpu.install()
    settings.validate()
    if settings.tasks == ["ruler"]:
        return _evaluate_ruler(settings)
    cases = [task for task in settings.tasks if task not in PER_DOCUMENT]
    prompt = open_prompt(settings) if cases else None
    lengths = set(settings.lengths)
    if prompt is not None:
        lengths.update(n for task in cases for n in validate_fit(settings, prompt, task))
    model = open_model(settings)
    if prompt is not None:
        validate_vocabulary(prompt.tokenizer, model)
    _note_longer_than_window(lengths, model)
    documents = open_documents(settings, model) if "perplexity" in settings.tasks else None
    results = [_score(settings, model, task, prompt, documents) for task in settings.tasks]
    if not model.primary:
        return []
    if settings.output:
        _write_suite(results, Path(settings.output))
    return results


def _evaluate_ruler(settings: EvaluationSettings) -> list[dict[str, Any]]:
    prompt, cases = open_cases(settings)
    model = open_model(settings)
    validate_vocabulary(prompt.tokenizer, model)
    _note_longer_than_window(set(settings.lengths), model)
    result = score_ruler(settings, model, prompt, cases)
    if not model.primary:
        return []
    if settings.output:
        note_missing_matplotlib()
    return [result]


def _note_longer_than_window(lengths: set[int], model: ScoringModel) -> None:
    longer = sorted(length for length in lengths if length > model.window)
    if longer and model.primary:
        print(
            f"note: --lengths has {' '.join(map(str, longer))}: {model.name} was extended to "
            f"{model.window} tokens",
            file=sys.stderr,
        )


def _score(
    settings: EvaluationSettings,
    model: ScoringModel,
    task: str,
    prompt: Prompt | None,
    documents: list[np.ndarray] | None,
) -> dict[str, Any]:
    folder = settings.output
    if folder and len(settings.tasks) > 1:
        folder = str(Path(folder) / task)
    if task == "longppl":
        return score_longppl(settings, model, folder)
    if prompt is None or task == "perplexity":
        return score_perplexity(settings, model, folder, documents)
    return score_cases(settings, model, prompt, task, folder)


def format_results(results: list[dict[str, Any]]) -> str:
    """Return the table of every result, and one of all if there are several."""
    tables = [table(result) for result in results]
    return "\n\n".join(tables + [suite_table(results)] * (len(results) > 1))


def _write_suite(results: list[dict[str, Any]], folder: Path) -> None:
    """Write table and picture of several tasks."""
    if len(results) > 1:
        write_whole(folder / "table.md", (suite_table(results) + "\n").encode())
        if has_matplotlib():
            draw_suite(results, folder / "picture.png")
    note_missing_matplotlib()
