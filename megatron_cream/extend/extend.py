# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream extend``: its settings, and its steps in order."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from megatron_cream import ownership
from megatron_cream.checkpoint.hf_files import find_hf_folder
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.extend.commands import Commands
from megatron_cream.extend.recipe import ExtendSettings, make_recipe
from megatron_cream.extend.steps import run_step
from megatron_cream.options import add_flags, read_flags, validate_fields
from megatron_cream.planning.models import find_model

EXAMPLES = """
    megatron-cream extend --hf SmolLM2-135M --text books/train --held-out books/validation \\
        --target-length 32K --output SmolLM2-135M-32K
    megatron-cream extend --hf meta-llama/Llama-3-8B --text data.jsonl --target-length 64K \\
        --gpus 8 --output llama-3-64k --dry-run

OUTPUT is a Hugging Face folder with a model card and report.html: the model before and after.
Started again, the command does what is left. docs/extend.md describes the recipe.
"""

_KIND = "extend"
_SETTINGS_FILE = "settings.json"
_FREE = ("dry_run", "workers", "reuse")  # may change between a run and its continuation
# What the import, the datasets and the first scores follow from: must agree to take them over.
_SHARED = (
    *("hf", "text", "held_out", "window", "target_length", "retrieval_share", "retrieval_loss"),
    *("steps", "global_batch_size", "lengths", "tasks", "cases", "cpu"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream extend``."""
    add_flags(parser, ExtendSettings)


def run(args: argparse.Namespace) -> None:
    """Extend the model that the command line names, and say where it is."""
    extend(read_flags(ExtendSettings, args))


def extend(settings: ExtendSettings) -> Path:
    """Extend a model's context window; returns the folder of the extended model.

    Imports the model, tokenizes the text, makes retrieval documents, trains with Megatron, exports,
    and scores the model before and after: each a command that is printed and can be run by itself.
    What is done already is not done again.

    Raises:
        UserError: settings that cannot work, or a step that failed, with the name of its log.
        OSError: a file that is missing or cannot be written.
    """
    _validate(settings)
    source = find_hf_folder(settings.hf)
    recipe = make_recipe(settings, find_model(str(source)))
    print(f"extend {source.name}: {recipe.describe()}", file=sys.stderr)
    plan = Commands(settings, recipe, source)
    if settings.dry_run:
        print("\n".join(f"\n# {step.name}\n{step.line()}" for step in plan.all_steps()))
        return Path(settings.output)
    work = settings.work_folder
    _begin(settings)
    if settings.reuse:
        _link_from(Path(settings.reuse), settings)
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    for step in plan.data_steps():
        run_step(step, logs)
    plan.hold_out()
    for step in plan.model_steps():
        run_step(step, logs)
    from megatron_cream.extend.html_report import write_report

    report = write_report(settings, recipe, plan.scores, plan.tasks)
    print(f"extended: {settings.output}\nreport: {report}\nlogs: {logs}")
    return Path(settings.output)


def _validate(settings: ExtendSettings) -> None:
    validate_fields(settings)
    if not 0 <= settings.retrieval_share < 1:
        raise UserError(
            f"--retrieval-share is {settings.retrieval_share:g}: it must be at least 0 and below 1"
        )
    for flag, value in (("--lr", settings.lr), ("--steps", settings.steps)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} is {value}: it must be above 0")
    unknown = set(settings.tasks) - {*TASKS, "perplexity"}
    if unknown:
        raise UserError(f"--tasks has {', '.join(sorted(unknown))}: it must name tasks of evaluate")
    for path in (*settings.text, *settings.held_out):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file or folder of text")


def _begin(settings: ExtendSettings) -> None:
    """Make the work folder, or go on in it with the settings that it was begun with.

    Raises:
        UserError: it is of something else or of other settings, or OUTPUT is a user's.
    """
    work = settings.work_folder
    ownership.validate_usable(work, _KIND, f"--work {work}")
    now = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE}
    record = work / _SETTINGS_FILE
    if record.exists():
        _validate_same(record, now, "give that again, or another --work and --output")
        return
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output is {output}: it must be a new or an empty folder")
    work.mkdir(parents=True, exist_ok=True)
    ownership.mark(work, _KIND)
    record.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _validate_same(record: Path, now: dict[str, Any], advice: str) -> None:
    before = json.loads(record.read_text("utf-8"))
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}: {record.parent} was begun with "
                f"{before.get(name)}; {advice}"
            )


def _link_from(other: Path, settings: ExtendSettings) -> None:
    """Link what another extension has made and this one would make just so.

    Raises:
        UserError: it is no working folder of an extension, or one of another model or text.
    """
    record = other / _SETTINGS_FILE
    if ownership.marked_kind(other) != _KIND or not record.exists():
        raise UserError(f"--reuse is {other}: it must be the working folder of an extension")
    shared = {name: getattr(settings, name) for name in _SHARED}
    _validate_same(record, shared, "give that, or leave out --reuse")
    before = other / "before"
    scored = {path.parent.name for path in before.glob("*/result.json")}
    # Scores that are not whole would be written on in the other's folder. One task has no table.
    whole = (before / "table.md").exists() or (len(scored) == 1 and scored == set(settings.tasks))
    names = ["base"] + ["before"] * whole
    for dataset in ("text", "held-out", "retrieval"):
        if (other / f"{dataset}.idx").exists():
            names += [path.name for path in other.glob(f"{dataset}.*")]
    for name in names:
        link = settings.work_folder / name
        if (other / name).exists() and not link.exists():
            link.symlink_to((other / name).resolve())
