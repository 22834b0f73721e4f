# SPDX-License-Identifier: Apache-2.0
"""The command line: ``megatron-cream COMMAND ...``, or ``python -m megatron_cream COMMAND ...``.

    megatron-cream plan llama-2-70b --gpus 64 --target-length 262144
    torchrun --nproc-per-node 2 -m megatron_cream evaluate passkey --checkpoint runs/cream ...

``COMMANDS`` is the list of all commands. The module of each has ``EXAMPLES`` (text for ``--help``),
``add_arguments(parser)`` and ``run(args)``; it is imported when its command is run. The commands
that take Megatron's flags have ``main()`` instead, which reads ``sys.argv``.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import megatron_cream
from megatron_cream.errors import BAD_INPUT_STATUS, UserError, one_line_errors

PROGRAM = "megatron-cream"


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        module: has what is run.
        summary: one line for ``--help``.
        takes_megatron_flags: whether Megatron parses the flags, in the module's ``main``.
        hides_import_warnings: whether to hide what Megatron and torch say on import of GPU
            packages that are missing, because none is needed.
        environment: variables that libraries read when they are loaded, unless they are set.
    """

    module: str
    summary: str
    takes_megatron_flags: bool = False
    hides_import_warnings: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


# Read by numpy when it is loaded: threads that nothing here uses would keep workers from forking.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
# Read by torch. Threads that spin at the end of every small operation, while another process has
# their core, make a forward pass take several times as long on a machine that is shared.
_NO_SPINNING = {"OMP_WAIT_POLICY": "passive"}

COMMANDS = {
    "preprocess": Command(
        "megatron_cream.corpus.preprocess",
        "Turn text into a Megatron indexed dataset.",
        environment=_ONE_THREAD,
    ),
    "merge": Command(
        "megatron_cream.corpus.merge",
        "Join indexed datasets: the shards of one job, or any with the same tokenizer.",
    ),
    "inspect": Command(
        "megatron_cream.corpus.inspection",
        "Look into an indexed dataset: statistics, a document's text, a full check.",
    ),
    "render-chat": Command(
        "megatron_cream.corpus.chat",
        "Turn conversations into documents by a tokenizer's chat template.",
    ),
    "retrieval-data": Command(
        "megatron_cream.corpus.retrieval",
        "Make documents that train a model to find what it read, as an indexed dataset.",
        environment=_ONE_THREAD,
    ),
    "extend": Command(
        "megatron_cream.extend.extend",
        "Extend a model: Hugging Face folder and text in, longer Hugging Face folder out.",
        hides_import_warnings=True,
    ),
    "positions": Command(
        "megatron_cream.positions.plots",
        "Report and draw where a strategy puts its tokens and which distances it trains.",
    ),
    "plan": Command(
        "megatron_cream.planning.plan",
        "Plan a run: layout, memory per GPU, time, command, next to full-length training.",
    ),
    "preflight": Command(
        "megatron_cream.planning.preflight",
        "Find the slow node of a job before it trains; started by torchrun.",
    ),
    "import": Command(
        "megatron_cream.checkpoint.import_hf",
        "Convert a Hugging Face checkpoint to Megatron's format, on a CPU, at any size.",
        hides_import_warnings=True,
    ),
    "train": Command(
        "megatron_cream.pretrain",
        "Train with Megatron's trainer; started by torchrun, takes Megatron's flags.",
        takes_megatron_flags=True,
    ),
    "launch": Command(
        "megatron_cream.launch",
        "Run an existing training script with our positions; started by torchrun.",
        takes_megatron_flags=True,
    ),
    "dry-run": Command(
        "megatron_cream.dry_run",
        "Check the flags of a run and print its stages and memory, without a GPU.",
        takes_megatron_flags=True,
    ),
    "export": Command(
        "megatron_cream.checkpoint.export_hf",
        "Convert a Megatron checkpoint to Hugging Face's format, on a CPU, at any size.",
        hides_import_warnings=True,
    ),
    "evaluate": Command(
        "megatron_cream.evaluation.evaluate",
        "Evaluate a Megatron checkpoint or a Hugging Face model on long text.",
        environment=_NO_SPINNING,
    ),
    "chat": Command(
        "megatron_cream.evaluation.conversation",
        "Ask a Hugging Face model, about a book or paper if one is given.",
        environment=_NO_SPINNING,
    ),
    "doctor": Command(
        "megatron_cream.checkpoint.doctor",
        "Read a Megatron checkpoint whole and say which of its files are damaged.",
        hides_import_warnings=True,
    ),
    "check-install": Command(
        "megatron_cream.check_install",
        "Check that the install works: imports, a dataset, two training steps on a CPU.",
        hides_import_warnings=True,
    ),
}
"""Every command by its name, in the order in which ``--help`` lists them."""

SCRIPT_NAMES = {
    "preprocess-data": "preprocess",
    "merge-datasets": "merge",
    "inspect-dataset": "inspect",
    "make-retrieval-data": "retrieval-data",
    "plot-positions": "positions",
}
"""Commands may also be named as the scripts of ``tools/`` that run them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help says the default of every flag.

    The description keeps its lines. A flag must be written out: no abbreviations.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """End in one line and the exit status of bad input."""
        self.exit(BAD_INPUT_STATUS, f"error: {' '.join(message.split())}\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of every flag that has one, and of those that are set by being named."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required or not action.option_strings or "default" in text:
            return text
        if action.default in (None, argparse.SUPPRESS):
            return text
        if action.const is True:
            return f"{text} (default: no)"
        return f"{text} (default: %(default)s)"


def main(
    argv: Sequence[str] | None = None, among: Iterable[str] = COMMANDS, program: str = PROGRAM
) -> int:
    """Run the command that the command line names; returns the exit status.

    Args:
        argv: the words after the program's name; ``sys.argv`` by default.
        among: the names to choose from.
        program: what the help calls itself.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    names = tuple(among)
    with one_line_errors():
        if words[:1] == ["--version"]:
            print(f"megatron_cream {megatron_cream.__version__}")
            return 0
        if not words or words[0] in ("-h", "--help"):
            print(_overview(names, program))
            return 0
        name, rest = _find(words, names)
    return run_command(name, rest, f"{program} {name}")


def _overview(names: Sequence[str], program: str) -> str:
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {COMMANDS[name].summary}" for name in names]
    usage = f"usage: {program} [--version] COMMAND [its flags, or --help]"
    return "\n".join([usage, "", "commands:", *lines])


def _find(words: Sequence[str], names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name of the command, and the words that are its own."""
    if words[0] == "convert-checkpoint" and len(words) > 1:  # tools/convert_checkpoint.py
        words = words[1:]
    name = SCRIPT_NAMES.get(words[0], words[0])
    if name not in names:
        raise UserError(f"COMMAND is {words[0]}: it must be one of {', '.join(names)}")
    return name, words[1:]


def run_command(name: str, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one command; bad input ends in one line and exit status 2.

    Args:
        name: of ``COMMANDS``.
        argv: its flags; those of ``sys.argv`` by default.
        program: what its help calls it; by default the script that was started.
    """
    command = COMMANDS[name]
    words = sys.argv[1:] if argv is None else list(argv)
    for variable, value in command.environment.items():
        os.environ.setdefault(variable, value)
    if command.hides_import_warnings:
        _hide_import_warnings()
    if command.takes_megatron_flags:
        sys.argv = [program or sys.argv[0], *words]
        importlib.import_module(command.module).main()
        return 0
    with one_line_errors():
        args = make_parser(name, program).parse_args(words)
        importlib.import_module(command.module).run(args)
    return 0


def make_parser(name: str, program: str | None = None) -> Parser:
    """Return the parser of a command that has flags of its own."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = Parser(prog=program, description=f"{command.summary}\n{module.EXAMPLES}")
    module.add_arguments(parser)
    return parser


def _hide_import_warnings() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
