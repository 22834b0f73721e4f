# SPDX-License-Identifier: Apache-2.0
"""Megatron's parser, readable: its errors in a line, its help printed whatever a text holds."""

from __future__ import annotations

from argparse import Action, ArgumentParser, HelpFormatter
from typing import NoReturn

from megatron_cream.errors import UserError


def make_readable(parser: ArgumentParser) -> ArgumentParser:
    """Have a parser of some 800 flags say what is wrong without listing them all.

    ``--help`` lists them, one of whose texts in Megatron 0.19.2 has a ``%`` that argparse cannot
    format.
    """
    parser.formatter_class = _Formatter
    parser.usage = "%(prog)s [Megatron-Core's flags] [megatron_cream's flags]"
    parser.error = _refuse
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


class _Formatter(HelpFormatter):
    """Prints a text as it is where its ``%`` makes no format."""

    def _expand_help(self, action: Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""
