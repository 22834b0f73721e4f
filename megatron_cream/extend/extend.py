# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream extend``: its settings, and its steps in order."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cream import ownership
from megatron_cream.checkpoint.hf_folder import find_hf_folder
from megatron_cream.corpus.input_files import (
    ARROW,
    PARQUET,
    find_inputs,
    format_of,
    is_compressed,
)
from megatron_cream.corpus.retrieval import SHORTEST
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.store import write_whole
from megatron_cream.extend.commands import Commands
from megatron_cream.extend.html_report import write_report
from megatron_cream.extend.recipe import ExtendSettings, Recipe, make_recipe
from megatron_cream.extend.steps import run_step
from megatron_cream.options import add_flags, read_flags, validate_fields
from megatron_cream.planning.models import BaseModel, find_model
from megatron_cream.planning.script import saved_bytes

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
    # Ends as an error does, so that the step that runs is ended, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
    model = find_model(str(source))
    recipe = make_recipe(settings, model)
    _validate_text(settings, recipe.window)
    if settings.retrieval_share and recipe.window < SHORTEST:
        raise UserError(
            f"--window is {recipe.window}: documents with questions have at least {SHORTEST} "
            "tokens; --retrieval-share 0 leaves them out"
        )
    print(f"extend {source.name}: {recipe.describe()}", file=sys.stderr)
    plan = Commands(settings, recipe, source)
    if settings.dry_run:
        print("\n".join(f"\n# {step.name}\n{step.line()}" for step in plan.all_steps()))
        return Path(settings.output)
    logs = settings.work_folder / "logs"
    with _begun(settings, lambda: _validate_space(settings, recipe, model, source)) as held:
        logs.mkdir(exist_ok=True)
        count = len(plan.all_steps())
        for number, step in enumerate(plan.steps(), 1):
            run_step(step, logs, f"{number}/{count}", held)
        report, table = write_report(settings, recipe, plan)
    print(f"\n{table}\n\nextended: {settings.output}\nreport: {report}\nlogs: {logs}")
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
    if None in find_inputs(settings.text, "--text").statuses:
        raise UserError("--text -: standard input can be read once only, needs files")
    if settings.held_out:
        find_inputs(settings.held_out, "--held-out")
    unknown = set(settings.tasks) - {*TASKS, "perplexity"}
    if unknown:
        raise UserError(f"--tasks has {', '.join(sorted(unknown))}: it must name tasks of evaluate")
    if settings.lengths and min(settings.lengths) < 1:
        raise UserError(f"--lengths has {min(settings.lengths)}: each must be at least 1 token")
    try:
        shlex.split(settings.train_args)
    except ValueError as error:
        raise UserError(f"--train-args is {settings.train_args}: {error}") from None


def _validate_text(settings: ExtendSettings, window: int) -> None:
    """Refuse text in which no document can have ``window`` tokens, as far as sizes tell.

    Raises:
        UserError: every file is shorter, and a token has at least a byte.
    """
    found = find_inputs(settings.text)
    sizes = [one.st_size for one in found.statuses if one is not None]
    plain = not any(is_compressed(p) or format_of(p) in (PARQUET, ARROW) for p in found.files)
    if plain and max(sizes) < window:
        raise UserError(
            f"--text {' '.join(settings.text)}: the largest file has {max(sizes)} bytes, a "
            f"document of {window} tokens, the window that is trained, needs at least as many: "
            "give longer text, or a shorter --window"
        )


def _validate_space(
    settings: ExtendSettings, recipe: Recipe, model: BaseModel, source: Path
) -> None:
    """Refuse folders on disks without room for what will be written there.

    Raises:
        UserError: naming the folder, the bytes that are free and those that are needed.
    """
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    text = find_inputs((*settings.text, *settings.held_out)).total_bytes
    # While a checkpoint is written, the one before is there.
    run = 2 * saved_bytes(model) if recipe.saves_optimizer else weights
    needed: dict[int, tuple[list[Path], int]] = {}
    for folder, size in ((settings.work_folder, weights + text + run), (settings.output, weights)):
        there = Path(folder).absolute()
        while not there.exists():
            there = there.parent
        folders, before = needed.get(there.stat().st_dev, ([], 0))
        needed[there.stat().st_dev] = [*folders, there], before + size
    for folders, size in needed.values():
        free = shutil.disk_usage(folders[0]).free
        locked = [folder for folder in folders if not os.access(folder, os.W_OK)]
        if locked:
            raise UserError(f"--output is {settings.output}: {locked[0]} cannot be written to")
        if free < size:
            raise UserError(
                f"--output is {settings.output}: the disk of {folders[0]} has {free / 1e9:.1f} GB "
                f"free, {size / 1e9:.1f} GB are needed"
            )


@contextmanager
def _begun(settings: ExtendSettings, validate: Callable[[], None]) -> Iterator[int]:
    """Make the work folder, or go on in it with the settings that it was begun with.

    Yields the descriptor of its lock. ``validate`` is asked before anything is made.

    Raises:
        UserError: it is of something else or of other settings, or OUTPUT is a user's.
        BlockingIOError: another process is at work in it.
    """
    work, output = settings.work_folder, Path(settings.output)
    record = work / _SETTINGS_FILE
    if not record.exists():
        ownership.validate_usable(work, _KIND, f"--work is {work}")
        ownership.validate_output(output)
        validate()
    held = ownership.lock(work, _KIND, f"--work is {work}", "another --work")
    try:
        now = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE}
        if record.exists():
            _validate_same(record, now, "give that again, or another --work and --output")
        else:
            write_whole(record, (json.dumps(now, indent=2) + "\n").encode())
        if settings.reuse:
            _link_from(Path(settings.reuse), settings)
        yield held
    finally:
        os.close(held)


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
