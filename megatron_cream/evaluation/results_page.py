# SPDX-License-Identifier: Apache-2.0
"""Compares finished runs, makes one page of them, and puts their figures into a model card."""

from __future__ import annotations

import base64
import html
import io
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_cream
from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results import (
    Result,
    joined_rows,
    joined_table,
    notes,
    result_rows,
    short,
)
from megatron_cream.evaluation.store import (
    CONTENT,
    RESULT_FILE,
    SETTINGS_FILE,
    note_missing_matplotlib,
    write_table,
    write_whole,
)
from megatron_cream.positions.plots import has_matplotlib

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="megatron_cream">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
th button {{ all: unset; cursor: pointer; font-weight: bold }}
th button:focus-visible {{ outline: 2px solid #0072b2 }}
th[aria-sort=ascending] button::after {{ content: " \\25b2" }}
th[aria-sort=descending] button::after {{ content: " \\25bc" }}
img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>
for (const button of document.querySelectorAll("th button")) button.onclick = () => {{
  const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].textContent;
  const order = (a, b) => {{
    const [x, y] = [parseFloat(a), parseFloat(b)];
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return isNaN(x) ? a.localeCompare(b) : x - y;
  }};
  const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)));
  table.tBodies[0].append(...(down ? rows.reverse() : rows));
}};
</script>
</body></html>
"""


def make_page(title: str, body: str) -> str:
    """Return a page; ``body`` is HTML, ``title`` a text."""
    return _PAGE.format(title=html.escape(title), body=body)


def is_page(path: Path) -> bool:
    """Return whether a file is a page that ``make_page`` made."""
    with open(path, "rb") as file:
        return b'content="megatron_cream"' in file.read(200)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose rows can be sorted by any column; the first row names the columns."""
    names = "".join(f"<th><button>{_cell(cell)}</button></th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return html.escape(text.replace("\\*", "*"))  # as Markdown has it


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{_cell(text)}</p>"


def html_picture(results: Sequence[Result], title: str) -> str:
    """Return the picture of runs of one task; nothing where matplotlib is not installed."""
    if not has_matplotlib():
        return ""
    from megatron_cream.evaluation.pictures import picture

    image = io.BytesIO()
    picture(results).savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def html_settings(settings: dict[str, Any]) -> str:
    """Return settings as JSON in a block."""
    return f"<pre>{html.escape(json.dumps(settings, indent=2))}</pre>"


def folded(title: str, body: str) -> str:
    """Return HTML that is shown when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


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


# What must be the same for runs to be compared; missing in a run of another kind of task.
_SAME = (
    *("task", "prompt", "shots", "seeds", "first_seed", "cases", "cases_file", "most_tokens"),
    *("records_of", "query_aware", "samples", "ruler_tasks"),
    *("haystack_content", "qa_content", "words_content"),
    *("data", "documents", "document_tokens", "stride", "truncate", "key_tokens"),
)


def compare(runs: Sequence[str], output: str | None) -> str:
    """Return the table of ``runs``; write table.md, result.json and picture.png to ``output``.

    Raises:
        FileNotFoundError: a run that is not finished.
        UserError: runs of different tasks, or of different cases.
    """
    if output is not None:
        _validate_folder(Path(output))
    results = [read_result(run) for run in runs]
    for run, result in zip(runs, results, strict=True):
        _validate_same_cases(runs[0], results[0], run, result)
    results = with_different_names(runs, results)
    table = joined_table(results)
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESULT_FILE, (json.dumps(results, indent=2) + "\n").encode())
        write_table(folder, table, results)
        note_missing_matplotlib()
    return table


def _validate_folder(folder: Path) -> None:
    """Refuse a folder with files of those names that an earlier comparison did not write."""
    written = folder / RESULT_FILE
    if (folder / SETTINGS_FILE).exists() or (written.exists() and not _is_list(written)):
        raise UserError(
            f"--output is {folder}: it has results of something else, which would be overwritten; "
            "it must be a new folder, or that of an earlier comparison"
        )


def _is_list(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), list)
    except (ValueError, RecursionError):
        return False


def _validate_same_cases(
    first: str, wanted: dict[str, Any], run: str, found: dict[str, Any]
) -> None:
    for key in different_settings(wanted, found)[:1]:
        raise UserError(
            f"RUN {run} has {key} {found.get(key)}: {first} has {wanted.get(key)}; runs to "
            "compare must have the same cases"
        )


def different_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return which of the settings that decide the cases differ between two results."""
    of_both = [key for key in CONTENT if key in one and key in other]
    return [key for key in (*_SAME, *of_both) if one.get(key) != other.get(key)]


def with_different_names(
    runs: Sequence[str | Path], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Name runs by their folders where two models have the same name."""
    if len({result["name"] for result in results}) == len(results):
        return results
    return [{**result, "name": Path(run).name} for run, result in zip(runs, results, strict=True)]
