# SPDX-License-Identifier: Apache-2.0
"""The steps of an extension as commands, each one that can be run by itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_cream import torchrun
from megatron_cream.checkpoint.iterations import TRACKER
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError
from megatron_cream.extend.recipe import (
    ExtendSettings,
    Recipe,
    machine_flags,
    schedule_flags,
)
from megatron_cream.extend.steps import RecipeStep

_HELD_OUT_DOCUMENTS = 8


def _tool(name: str, makes: Path, *words: str) -> RecipeStep:
    return RecipeStep(name, makes, [sys.executable, "-m", "megatron_cream", *words])


class Commands:
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
        self.tasks = tuple(dict.fromkeys(("perplexity", *settings.tasks)))
        # Documents of the text in all and of them to train on; known once they were counted.
        self.counted: tuple[int, int] | None = None

    def all_steps(self) -> list[RecipeStep]:
        """Return every step, as far as it is known before the text was read."""
        return [*self.text_steps(), *self.model_steps()]

    def steps(self) -> Iterator[RecipeStep]:
        """Yield every step; those after the text follow from it.

        Raises:
            UserError: text that is too short.
        """
        yield from self.text_steps()
        self.hold_out()
        yield from self.model_steps()

    def text_steps(self) -> list[RecipeStep]:
        """Return the steps that read text: first of all, as text can turn out too short."""
        steps = [self._dataset("text", self.settings.text, self.recipe.window)]
        if self.settings.held_out:
            # Shorter documents are passed over when perplexity is measured; none is no error.
            steps.append(self._dataset("held-out", self.settings.held_out, 2))
        return steps

    def model_steps(self) -> list[RecipeStep]:
        """Return the steps from the import to the last scores."""
        output = Path(self.settings.output)
        read = ("import", "--hf", str(self.source), "--output", str(self.base))
        write = ("export", "--checkpoint", str(self.run), "--output", str(output))
        return [
            _tool("import", self.base, *read),
            *([self._retrieval()] if self.settings.retrieval_share else []),
            self._score("before", self.source, self.base),
            self._train(),
            _tool("export", output / "config.json", *write),  # the folder may be there, empty
            self._score("after", output, self.run),
        ]

    def hold_out(self) -> None:
        """Count the text's documents, and keep some from training where no text was held out.

        Raises:
            UserError: there are too few, or nothing can be measured.
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
            self.tasks = tuple(task for task in self.tasks if task != "perplexity")
            if not self.tasks:
                raise UserError(
                    f"no held-out document has {self._scored_tokens} tokens, which --lengths or "
                    "--target-length ask for: perplexity cannot be measured, and --tasks names "
                    "nothing else"
                )
            print(
                f"note: no held-out document has {self._scored_tokens} tokens: perplexity is not "
                "measured",
                file=sys.stderr,
            )

    @property
    def _scored_tokens(self) -> int:
        return self.lengths[-1] + 1

    def _dataset(self, name: str, texts: tuple[str, ...], shortest: int) -> RecipeStep:
        prefix = self.work / name
        return _tool(
            f"tokenize-{name}",
            prefix.with_name(f"{name}.idx"),
            *("preprocess", "--input", *texts, *self.tokenizer, "--min-tokens", str(shortest)),
            *("--workers", str(self.settings.workers), "--output-prefix", str(prefix)),
        )

    def _retrieval(self) -> RecipeStep:
        settings, prefix = self.settings, self.work / "retrieval"
        # Twice their share of the samples: none is read again, whatever the blend draws.
        count = max(1, round(2 * settings.retrieval_share * self.recipe.samples))
        # Facts are hidden in the training text, unless some of it is to be measured on.
        more = ["--haystack", *settings.text] if settings.held_out else []
        if settings.retrieval_loss == "answers":
            more.append("--answers-only")
        return _tool(
            "retrieval-documents",
            prefix.with_name("retrieval.idx"),
            *("retrieval-data", *self.tokenizer, "--length", str(self.recipe.window)),
            *("--documents", str(count), *more),
            *("--workers", str(settings.workers), "--output-prefix", str(prefix)),
        )

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
            *("--position-strategy", recipe.strategy),
            *("--rope-interpolation", settings.rope_interpolation),
            *("--data-path", *data, "--split", self._split()),
            "--no-create-attention-mask-in-dataloader",
            *("--pretrained-checkpoint", str(self.base)),
            *("--save", str(self.run), "--load", str(self.run)),
            *(*schedule_flags(recipe), *machine_flags(recipe), *shlex.split(settings.train_args)),
        ]
        command = torchrun.command(recipe.processes, "-m", "megatron_cream.pretrain", *flags)
        return RecipeStep("train", self.run / TRACKER, command, trains=recipe.steps)

    def _split(self) -> str:
        if self.settings.held_out:
            return "100,0,0"
        if self.counted is None:
            return "98,2,0"
        count, trained = self.counted
        return f"{trained},{count - trained},0"

    def _score(self, name: str, model: Path, checkpoint: Path) -> RecipeStep:
        """Return the step that scores a model; nothing is scored twice.

        A model that training spreads is scored so, too, from its checkpoint: one GPU would not
        hold it.
        """
        output = self.work / name
        made = output / "table.md"
        if len(self.tasks) == 1:  # evaluate makes no folder per task then
            output = output / self.tasks[0]
            made = output / "result.json"
        command = [
            *self._evaluate(model, checkpoint),
            *("--tasks", *self.tasks, "--name", model.name, "--cases", str(self.settings.cases)),
            *("--lengths", *map(str, self.lengths), "--output", str(output)),
            *("--batch-tokens", str(max(8192, self.recipe.target))),
        ]
        if "perplexity" in self.tasks:
            # Where --reuse made links: extensions with the same text can be compared.
            text = "held-out" if self.settings.held_out else "text"
            data = (self.work / f"{text}.idx").resolve().with_suffix("")
            skipped = self.counted[1] if self.counted and not self.settings.held_out else 0
            command += ["--data", str(data), "--document-tokens", str(self._scored_tokens)]
            command += ["--documents", str(self._documents(data, skipped))]
            command += ["--skip-documents", str(skipped)] if skipped else []
        return RecipeStep(f"score-{name}", made, command)

    def _evaluate(self, model: Path, checkpoint: Path) -> list[str]:
        words, layout = ["-m", "megatron_cream", "evaluate", "all"], self.recipe.layout
        ranks = layout.tensor * layout.pipeline
        if ranks > 1:
            sizes = (
                *("--tensor-model-parallel-size", str(layout.tensor)),
                *("--pipeline-model-parallel-size", str(layout.pipeline)),
            )
            return [
                *torchrun.command(ranks, *words),
                *("--checkpoint", str(checkpoint), *sizes),
            ]
        number = [] if self.settings.cpu else ["--dtype", "bfloat16"]
        return [sys.executable, *words, "--hf", str(model), *number]

    def _documents(self, data: Path, skipped: int) -> int:
        if self.counted is None:
            return _HELD_OUT_DOCUMENTS
        lengths = read_index(data).lengths[skipped:]
        return min(_HELD_OUT_DOCUMENTS, int((lengths >= self._scored_tokens).sum()))
