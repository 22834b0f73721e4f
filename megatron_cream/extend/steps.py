# SPDX-License-Identifier: Apache-2.0
"""Runs one step: a command that is printed, its whole output in a log, its progress on screen."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_cream import torchrun
from megatron_cream.errors import UserError
from megatron_cream.evaluation.store import write_whole

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ .*lm loss: (\S+)")
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .+)")
_LAST_LINES = 20
_ERROR = "error:"
_SECONDS = "seconds.json"


@dataclass(frozen=True)
class RecipeStep:
    """One command of the recipe.

    Attributes:
        name: of the step and of its log.
        makes: what it writes last: where it is there, the step is done. Of a trainer the file of
            its newest checkpoint's number, which must be ``trains``.
        command: what is run, word by word.
        trains: optimizer steps, where the command is the trainer.
    """

    name: str
    makes: Path
    command: Sequence[str]
    trains: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether all is there that it makes."""
        if self.trains and self.makes.exists():
            return self.makes.read_text().strip() == str(self.trains)
        return self.makes.exists()

    def line(self) -> str:
        """Return the command as it is typed."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words)


def run_step(step: RecipeStep, logs: Path, place: str = "", held: int | None = None) -> bool:
    """Run a step unless what it makes is there; returns whether it ran.

    Args:
        step: what is run.
        logs: folder of its log, and of the seconds that each step took.
        place: among the other steps, as ``3/8``.
        held: descriptor of a lock that the command has, too: killed alone, this process leaves a
            command that goes on.

    Raises:
        UserError: it failed: its own message, or the end of its output, and where its log is.
    """
    name = f"[{place}] {step.name}" if place else step.name
    if step.is_done:
        print(f"{name}: {step.makes} is there", file=sys.stderr)
        return False
    print(f"{name}\n$ {step.line()}", file=sys.stderr, flush=True)
    log, began = logs / f"{step.name}.log", time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {step.line()}\n")
        file.flush()
        run = _run_training if step.trains else _run_tool
        status, lines = run(step, file, () if held is None else (held,))
    if status or not step.is_done:
        reason = _reason(lines) if status else f"it ended and has not made {step.makes}"
        raise UserError(f"{step.name}: {reason} (log: {log})")
    seconds = read_seconds(logs) | {step.name: round(time.monotonic() - began, 1)}
    write_whole(logs / _SECONDS, json.dumps(seconds).encode())
    return True


def _reason(lines: list[str]) -> str:
    """Return what a command says of its end: its error, else its exception, else its last lines."""
    said = [line.removeprefix(_ERROR).strip() for line in lines if line.startswith(_ERROR)]
    raised = [found[1] for line in lines if (found := _EXCEPTION.match(line))]
    return (said or raised or ["\n".join(lines[-_LAST_LINES:])])[-1]


def read_seconds(logs: Path) -> dict[str, float]:
    """Return what each finished step took, by name; of one that was interrupted its last start."""
    path = logs / _SECONDS
    return json.loads(path.read_bytes()) if path.exists() else {}


@contextmanager
def _started(step: RecipeStep, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a command that ends where this process is interrupted."""
    with subprocess.Popen(step.command, **options) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


def _run_tool(step: RecipeStep, log: IO[str], held: tuple[int, ...]) -> tuple[int, list[str]]:
    """Run a command whose progress bar goes to the screen as it is; its results go to the log."""
    with _started(step, stdout=log, stderr=subprocess.PIPE, pass_fds=held) as process:
        assert process.stderr is not None
        # A bar returns to the start of its line, which must stay so on the screen.
        lines = list(_show(io.TextIOWrapper(process.stderr, errors="replace", newline="")))
    log.write("".join(f"{line}\n" for line in lines))
    return process.returncode, lines


def _show(stream: IO[str]) -> Iterator[str]:
    """Copy a stream to the screen as it comes; yield its lines, a bar as its last state.

    A line that begins as an error is left for the one who ends with it.
    """
    line = waiting = ""
    while character := stream.read(1):
        ends = character in "\r\n"
        line += "" if ends else character
        waiting += character
        start = line[: len(_ERROR)]
        if not _ERROR.startswith(start) or (ends and start != _ERROR):
            sys.stderr.write(waiting)
            waiting = ""
        if ends:
            sys.stderr.flush()
            if character == "\n":
                yield line
            line = waiting = ""
    if line:
        yield line


def _run_training(step: RecipeStep, log: IO[str], held: tuple[int, ...]) -> tuple[int, list[str]]:
    """Run the trainer: of its output the start block and the losses are shown."""
    lines: list[str] = []
    block: list[str] = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    environment = torchrun.environment(CUDA_DEVICE_MAX_CONNECTIONS="1")
    with (
        tqdm(total=step.trains, desc=step.name, unit="step") as bar,
        _started(step, **options, env=environment, text=True, pass_fds=held) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.append(line.rstrip())
            if lines[-1] == "megatron_cream" or (block and line.startswith("  ")):
                block.append(lines[-1])
            elif block:
                bar.write("\n".join(block), file=sys.stderr)
                block = []
            if found := _ITERATION.search(line):
                if bar.n == 0:
                    bar.unpause()  # the rate is that of steps, without the start
                bar.update(int(found[1]) - bar.n)
                bar.set_postfix(loss=f"{float(found[2]):.3f}")
    return process.returncode, lines
