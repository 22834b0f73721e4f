# SPDX-License-Identifier: Apache-2.0
"""The command line of the data tools: every default in ``--help``, every error in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from megatron_cream.errors import BAD_INPUT_STATUS


class Parser(argparse.ArgumentParser):
    """A parser of a tool whose description is laid out by hand."""

    def __init__(self, description: str | None, *, allow_abbrev: bool = True) -> None:
        super().__init__(description=description, allow_abbrev=allow_abbrev, formatter_class=_Help)

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
