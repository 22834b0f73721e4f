# SPDX-License-Identifier: Apache-2.0
"""Runs one step: a command that is printed, its whole output in a log, its progress on screen."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from megatron_cream import torchrun
from megatron_cream.errors import UserError

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ .*lm loss: (\S+)")
_LAST_LINES = 20


@dataclass(frozen=True)
class RecipeStep:
    """One command of the recipe.

    Attributes:
        name: of the step and of its log.
        makes: what it writes last: where it is there, the step is done. Of a trainer, whose
            checkpoints say only how far it came, a mark that is set here.
        command: what is run, word by word.
        trains: optimizer steps, where the command is the trainer.
    """

    name: str
    makes: Path
    command: Sequence[str]
    trains: int | None = None

    def line(self) -> str:
        """Return the command as it is typed."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words)


def run_step(step: RecipeStep, logs: Path) -> bool:
    """Run a step unless what it makes is there; returns whether it ran.

    Raises:
        UserError: it failed: its own message, or the end of its output, and where its log is.
    """
    if step.makes.exists():
        print(f"{step.name}: {step.makes} is there", file=sys.stderr)
        return False
    print(f"$ {step.line()}", file=sys.stderr, flush=True)
    log = logs / f"{step.name}.log"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {step.line()}\n")
        file.flush()
        run = _run_training if step.trains else _run_tool
        status, lines = run(step, file)
    if status:
        errors = [line for line in lines if line.startswith("error:")][-1:] or lines[-_LAST_LINES:]
        reason = "\n".join(errors).removeprefix("error: ")
        raise UserError(f"{step.name}: {reason or f'exit status {status}'} (log: {log})")
    if step.trains:
        step.makes.touch()
    return True


def _run_tool(step: RecipeStep, log: IO[str]) -> tuple[int, list[str]]:
    """Run a command whose progress bar goes to the screen as it is; its results go to the log."""
    with subprocess.Popen(
        step.command,
        stdout=log,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        # A bar returns to the start of its line, which must stay so on the screen.
        lines = list(_show(io.TextIOWrapper(process.stderr, errors="replace", newline="")))
    log.write("".join(f"{line}\n" for line in lines))
    return process.returncode, lines


def _show(stream: IO[str]) -> Iterator[str]:
    """Copy a stream to the screen as it comes; yield its lines, a bar as its last state."""
    line = ""
    while character := stream.read(1):
        sys.stderr.write(character)
        if character in "\r\n":
            sys.stderr.flush()
            if character == "\n":
                yield line
            line = ""
        else:
            line += character
    if line:
        yield line


def _run_training(step: RecipeStep, log: IO[str]) -> tuple[int, list[str]]:
    """Run the trainer: of its output the start block and the losses are shown."""
    lines: list[str] = []
    environment = torchrun.environment(CUDA_DEVICE_MAX_CONNECTIONS="1")
    with (
        tqdm(total=step.trains, desc=step.name, unit="step") as bar,
        subprocess.Popen(
            step.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        in_block = False
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.append(line.rstrip())
            in_block = line.rstrip() == "megatron_cream" or (in_block and line.startswith("  "))
            if in_block:
                bar.write(line.rstrip(), file=sys.stderr)
            if found := _ITERATION.search(line):
                if bar.n == 0:
                    bar.unpause()  # the rate is that of steps, without the start
                bar.update(int(found[1]) - bar.n)
                bar.set_postfix(loss=f"{float(found[2]):.3f}")
    return process.returncode, lines
