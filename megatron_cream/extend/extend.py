# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream extend``: its settings, and its steps in order."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from megatron_cream import ownership, torchrun
from megatron_cream.checkpoint.hf_files import find_hf_folder
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluate import HELP
from megatron_cream.extend.recipe import (
    ExtendSettings,
    Recipe,
    machine_flags,
    make_recipe,
    schedule_flags,
)
from megatron_cream.extend.steps import RecipeStep, run_step
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
_HELD_OUT_DOCUMENTS = 8
_FREE = ("dry_run", "workers")  # may change between a run and its continuation


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
    plan = _Commands(settings, recipe, source)
    if settings.dry_run:
        print("\n".join(f"\n# {step.name}\n{step.line()}" for step in plan.all_steps()))
        return Path(settings.output)
    work = settings.work_folder
    _begin(settings)
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
    unknown = set(settings.tasks) - (set(HELP) - {"all", "perplexity", "ruler"})
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
        before = json.loads(record.read_text("utf-8"))
        for name, value in json.loads(json.dumps(now)).items():
            if before.get(name) != value:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value}: {work} was begun with "
                    f"{before.get(name)}; give that again, or another --work and --output"
                )
        return
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output is {output}: it must be a new or an empty folder")
    work.mkdir(parents=True, exist_ok=True)
    ownership.mark(work, _KIND)
    record.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


class _Commands:
    """The steps as commands.

    Attributes:
        scores: folder of the scores before and of those after.
        tasks: what is scored.
    """

    def __init__(self, settings: ExtendSettings, recipe: Recipe, source: Path) -> None:
        self.settings, self.recipe, self.source = settings, recipe, source
        self.work = settings.work_folder
        self.base, self.run = self.work / "base", self.work / "run"
        self.tokenizer = [
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(source)),
        ]
        self.scores = (self.work / "before", self.work / "after")
        self.lengths = sorted(set(settings.lengths or recipe.lengths))
        self.tasks: tuple[str, ...] = ("perplexity", *settings.tasks)
        # Documents of the text in all and of them to train on; known once they were counted.
        self.counted: tuple[int, int] | None = None

    def all_steps(self) -> list[RecipeStep]:
        """Return every step, for a dry run."""
        return [*self.data_steps(), *self.model_steps()]

    def data_steps(self) -> list[RecipeStep]:
        """Return the steps up to training's input."""
        steps = [
            self._tool("import", self.base, "import", "--hf", str(self.source), "--output"),
            self._dataset("text", self.settings.text, self.recipe.window),
        ]
        if self.settings.held_out:
            steps.append(self._dataset("held-out", self.settings.held_out, self._scored_tokens))
        if self.settings.retrieval_share:
            steps.append(self._retrieval())
        return steps

    def model_steps(self) -> list[RecipeStep]:
        """Return the steps from the first scores to the last."""
        before, after = self.scores
        output = Path(self.settings.output)
        return [
            *self._score("before", self.source, before),
            self._train(),
            self._tool("export", output, "export", "--checkpoint", str(self.run), "--output"),
            *self._score("after", output, after),
        ]

    def hold_out(self) -> None:
        """Count the text's documents, and keep some from training where no text was held out.

        Raises:
            UserError: there are too few.
        """
        path = self.work / "text"
        lengths = read_index(path).lengths
        if not len(lengths):
            raise UserError(
                f"--text has no document of {self.recipe.window} tokens, the window that is "
                "trained: give longer text, or a shorter --window"
            )
        kept = 0 if self.settings.held_out else min(len(lengths) - 1, max(4, len(lengths) // 50))
        self.counted = len(lengths), len(lengths) - kept
        data = self.work / "held-out" if self.settings.held_out else path
        tail = read_index(data).lengths[0 if self.settings.held_out else len(lengths) - kept :]
        if not (tail >= self._scored_tokens).any():
            self.tasks = self.settings.tasks
            print(
                f"note: no held-out document has {self._scored_tokens} tokens: perplexity is not "
                "measured",
                file=sys.stderr,
            )

    @property
    def _scored_tokens(self) -> int:
        return self.lengths[-1] + 1

    def _tool(self, name: str, makes: Path, *words: str) -> RecipeStep:
        command = [sys.executable, "-m", "megatron_cream", *words, str(makes)]
        return RecipeStep(name, makes, command)

    def _dataset(self, name: str, texts: tuple[str, ...], shortest: int) -> RecipeStep:
        prefix = self.work / name
        command = [
            *(sys.executable, "-m", "megatron_cream", "preprocess", "--input", *texts),
            *(*self.tokenizer, "--min-tokens", str(shortest)),
            *("--workers", str(self.settings.workers), "--output-prefix", str(prefix)),
        ]
        return RecipeStep(f"tokenize-{name}", prefix.with_name(f"{name}.idx"), command)

    def _retrieval(self) -> RecipeStep:
        settings, prefix = self.settings, self.work / "retrieval"
        # Twice their share of the samples: none is read again, whatever the blend draws.
        count = max(1, round(2 * settings.retrieval_share * self.recipe.samples))
        # Facts are hidden in the training text, unless some of it is to be measured on.
        haystack = ["--haystack", *settings.text] if settings.held_out else []
        command = [
            *(sys.executable, "-m", "megatron_cream", "retrieval-data", *self.tokenizer),
            *("--length", str(self.recipe.window), "--documents", str(count), *haystack),
            *("--workers", str(settings.workers), "--output-prefix", str(prefix)),
        ]
        return RecipeStep("retrieval-documents", prefix.with_name("retrieval.idx"), command)

    def _train(self) -> RecipeStep:
        settings, recipe = self.settings, self.recipe
        share, text = settings.retrieval_share, str(self.work / "text")
        data = [text]
        if share:
            data = [f"{1 - share:g}", text, f"{share:g}", str(self.work / "retrieval")]
        flags = [
            *("--use-checkpoint-args", "--position-embedding-type", "rope"),
            *self.tokenizer,
            *("--attention-dropout", "0", "--hidden-dropout", "0", "--seed", str(settings.seed)),
            *("--seq-length", str(recipe.window)),
            *("--max-position-embeddings", str(recipe.window)),
            *("--target-length", str(recipe.target)),
            *("--position-strategy", settings.position_strategy),
            *("--rope-interpolation", settings.rope_interpolation),
            *("--data-path", *data, "--split", self._split()),
            "--no-create-attention-mask-in-dataloader",
            *("--pretrained-checkpoint", str(self.base)),
            *("--save", str(self.run), "--load", str(self.run)),
            *(*schedule_flags(recipe), *machine_flags(recipe)),
        ]
        command = torchrun.command(recipe.processes, "-m", "megatron_cream.pretrain", *flags)
        return RecipeStep("train", self.work / "trained", command, trains=recipe.steps)

    def _split(self) -> str:
        if self.settings.held_out:
            return "100,0,0"
        if self.counted is None:
            return "98,2,0"
        count, trained = self.counted
        return f"{trained},{count - trained},0"

    def _score(self, name: str, model: Path, output: Path) -> list[RecipeStep]:
        """Return the step that scores a model; nothing is scored twice."""
        data = self.work / ("held-out" if self.settings.held_out else "text")
        skipped = self.counted[1] if self.counted and not self.settings.held_out else 0
        command = [
            *(sys.executable, "-m", "megatron_cream", "evaluate", "all", "--tasks", *self.tasks),
            *("--hf", str(model), "--name", name, "--cases", str(self.settings.cases)),
            *("--lengths", *map(str, self.lengths), "--output", str(output)),
            *("--batch-tokens", str(max(8192, self.recipe.target))),
            *([] if self.settings.cpu else ["--dtype", "bfloat16"]),
        ]
        if "perplexity" in self.tasks:
            command += ["--data", str(data), "--document-tokens", str(self._scored_tokens)]
            command += ["--documents", str(self._documents(data, skipped))]
            command += ["--skip-documents", str(skipped)] if skipped else []
        return [RecipeStep(f"score-{name}", output / "table.md", command)]

    def _documents(self, data: Path, skipped: int) -> int:
        if self.counted is None:
            return _HELD_OUT_DOCUMENTS
        lengths = read_index(data).lengths[skipped:]
        return min(_HELD_OUT_DOCUMENTS, int((lengths >= self._scored_tokens).sum()))
