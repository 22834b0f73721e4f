# SPDX-License-Identifier: Apache-2.0
"""Makes one page of finished runs, and puts their figures into a model card."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_cream
from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.evaluation.compare import different_settings, with_different_names
from megatron_cream.evaluation.html_page import (
    folded,
    html_picture,
    html_settings,
    html_table,
    is_page,
    make_page,
    paragraph,
)
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results import Result, joined_rows, notes, result_rows, short
from megatron_cream.evaluation.store import RESULT_FILE, write_whole

_ROWS = ("lengths", "positions", "places")  # of a result: figures, no settings
_SOURCE = "megatron_cream"
_URL = "https://pypi.org/project/megatron-cream/"


def run_report(args: Namespace) -> str:
    """Run a parsed command line and return what it says.

    Raises:
        UserError, OSError: as ``write_report`` and ``add_to_card``, or neither is asked for.
    """
    if args.output is None and args.card is None:
        raise UserError("--output or --card is missing: name a page to write, or a model card")
    said = []
    if args.output is not None:
        said.append(str(write_report(args.runs, args.output, args.title)))
    if args.card is not None:
        said.append(f"{args.card}: {add_to_card(args.runs, args.card)} figures in model-index")
    return "\n".join(said)


def read_runs(runs: Sequence[str]) -> list[tuple[Path, Result]]:
    """Return folder and result of each run, in order; a run of several tasks has several.

    Raises:
        FileNotFoundError: a run that is not finished.
        UserError: a file that is damaged, or no result.
    """
    found = []
    for run in map(Path, runs):
        inside = [run] if (run / RESULT_FILE).is_file() else _tasks(run)
        found += [(folder, read_result(folder)) for folder in inside or [run]]
    return found


def _tasks(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob(f"*/{RESULT_FILE}"))


def write_report(runs: Sequence[str], output: str, title: str | None = None) -> Path:
    """Write a page of finished runs to ``output`` and return its path.

    It has, for each task, a table of all models by length and their picture; the whole table, the
    settings and the versions of each run. Runs of the same task that differ in their cases are
    kept apart. The page is one file, and asks nothing of a network.

    Args:
        runs: ``--output`` of finished runs, of one task or of several.
        title: of the page; the names of the models unless given.

    Raises:
        FileNotFoundError: a run that is not finished.
        UserError: a damaged file, or a file at ``output`` that is no such page.
    """
    path = Path(output)
    _validate_output(path)
    found = read_runs(runs)
    names = list(dict.fromkeys(result["name"] for _, result in found))
    body = "".join(_section(group) for group in _groups(found))
    body += paragraph(f"Made by megatron_cream {megatron_cream.__version__}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, make_page(title or ", ".join(names), body).encode())
    return path


def _validate_output(path: Path) -> None:
    if path.exists() and not (path.is_file() and is_page(path)):
        raise UserError(f"--output is {path}: it must be a new file, or an earlier report")


def _groups(found: list[tuple[Path, Result]]) -> list[list[tuple[Path, Result]]]:
    """Return runs that have their cases in common, together."""
    groups: list[list[tuple[Path, Result]]] = []
    for one in found:
        group = next((g for g in groups if not different_settings(g[0][1], one[1])), None)
        groups.append([one]) if group is None else group.append(one)
    return groups


def _section(group: list[tuple[Path, Result]]) -> str:
    results = with_different_names([path for path, _ in group], [result for _, result in group])
    task = results[0]["task"]
    parts = [f"<h2>{task}</h2>", html_table(joined_rows(results))]
    parts += [paragraph(note) for note in notes(results)]
    parts.append(html_picture(results, f"{task} by length"))
    for (folder, _), result in zip(group, results, strict=True):
        settings = {key: value for key, value in result.items() if key not in _ROWS}
        parts.append(
            folded(
                f"{result['name']}: all figures, settings, versions ({folder})",
                html_table(result_rows(result)) + html_settings(settings),
            )
        )
    return "".join(parts)


def add_to_card(runs: Sequence[str], card: str) -> int:
    """Put figures of finished runs into a model card's ``model-index``; returns their number.

    Figures of an earlier call are replaced, other results and all else of the card stay.

    Raises:
        FileNotFoundError: a run that is not finished, or no card.
        UserError: runs of several models, or a card that cannot be read.
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard
    except ImportError as exc:
        raise MissingPackageError(
            "--card needs huggingface_hub, which comes with transformers: pip install transformers",
            name="huggingface_hub",
        ) from exc
    results = [result for _, result in read_runs(runs)]
    names = sorted({result["name"] for result in results})
    if len(names) > 1:
        raise UserError(f"RUN: a card is of one model, these are of {', '.join(names)}")
    if not Path(card).is_file():
        raise FileNotFoundError(f"--card is {card}: it must be the README.md of a model")
    try:
        loaded = ModelCard.load(card)
    except ValueError as error:
        raise UserError(f"--card is {card}: its front matter cannot be read ({error})") from None
    ours = [
        EvalResult(
            # The library tells results apart by these, and by no dataset_name.
            task_type="text-generation", dataset_type=result["task"],
            dataset_config=f"{short(row['length'])} tokens",
            dataset_name=result["task"], source_name=_SOURCE, source_url=_URL,
            metric_type=kind, metric_name=name, metric_value=value,
        )
        for result in results
        for row in result["lengths"]
        for kind, name, value in _metrics(result["task"], row)
    ]  # fmt: skip
    others = [one for one in loaded.data.eval_results or [] if one.source_name != _SOURCE]
    loaded.data.model_name = loaded.data.model_name or names[0]
    loaded.data.eval_results = others + ours
    write_whole(Path(card), str(loaded).encode())
    return len(ours)


def _metrics(task: str, row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return type, name and value of the figures of one length."""
    if task == "ruler":
        return [("accuracy", "average of string matches, %", round(row["average"], 2))]
    if "perplexity" in row:
        names = [("longppl", "LongPPL")] * ("longppl" in row) + [("perplexity", "perplexity")]
        return [(key, name, round(row[key], 4)) for key, name in names]
    return [("accuracy", "exact answers, %", round(100 * row["hit"], 2))]
