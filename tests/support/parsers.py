# SPDX-License-Identifier: Apache-2.0
"""The parsers of the tools and of a training run, taken from them without a run."""

from __future__ import annotations

import os
import runpy
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from copy import deepcopy
from functools import cache
from pathlib import Path
from unittest.mock import patch

from megatron_cream import cli
from megatron_cream.errors import UserError
from support.launch import ROOT


class WrongCommandError(Exception):
    """A documented command names something that is not there."""


def need(condition: object, message: str) -> None:
    """Raise WrongCommandError unless ``condition``."""
    if not condition:
        raise WrongCommandError(message)


class _Reached(BaseException):
    """A tool is about to parse its command line."""


@cache
def tool_parser(path: Path) -> ArgumentParser:
    """The parser of a tool: the tool is started, and stopped where it would parse."""

    def stop(parser: ArgumentParser, *_: object, **__: object) -> None:
        raise _Reached(parser)

    with (
        patch.object(ArgumentParser, "parse_args", stop),
        patch.object(sys, "argv", [str(path)]),
        patch.dict(os.environ),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Reached as reached:
            return reached.args[0]
    raise WrongCommandError(f"{path} parses no command line")


@cache
def pretrain_parser() -> ArgumentParser:
    """The parser of megatron_cream.pretrain: Megatron's flags and ours."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_cream.training.arguments import add_arguments

    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def parse(parser: ArgumentParser, words: list[str], elided: bool = False) -> Namespace | None:
    """Parse ``words``; where the page leaves flags out none is required."""

    def refuse(_: ArgumentParser, *said: object) -> None:
        raise WrongCommandError(str(said[-1]) if said else "0")

    if elided:
        parser = deepcopy(parser)
        for action in _actions(parser):
            action.required = False
            if action.option_strings and action.nargs is None:
                action.nargs = "?"  # a flag that is spoken of needs no value
    with (
        patch.object(ArgumentParser, "error", refuse),
        patch.object(ArgumentParser, "exit", refuse),
        patch.object(ArgumentParser, "print_help", lambda *_: None),
    ):
        try:
            return parser.parse_args(words)
        except UserError as error:  # the parser of a run refuses by itself
            raise WrongCommandError(str(error)) from None
        except WrongCommandError as error:
            if {"--help", "--check-published"} & {*words} and error.args[0].isdigit():
                return None
            raise


def _actions(parser: ArgumentParser) -> list:
    inner = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    parsers = [part for action in inner for part in action.choices.values()]
    return [*parser._actions, *(action for part in parsers for action in _actions(part))]


@cache
def command_parser(name: str) -> ArgumentParser:
    """The parser of a sub-command that has flags of its own."""
    return cli.make_parser(name)


def known_flags() -> set[str]:
    """Every flag that a tool or a run of training takes."""
    parsers = [tool_parser(path) for path in sorted(ROOT.glob("tools/benchmark_*.py"))]
    own = [name for name, one in cli.COMMANDS.items() if not one.takes_megatron_flags]
    parsers += map(command_parser, own)
    actions = [action for parser in [*parsers, pretrain_parser()] for action in _actions(parser)]
    return {flag for action in actions for flag in action.option_strings}
