# SPDX-License-Identifier: Apache-2.0
"""Declares settings once, each with its flag, help and limits.

``Option`` is one setting of a position strategy or of a RoPE interpolation, declared on its class:
flags, their help, checks, checkpoint settings and the tables of the docs follow from it.
``flag_field`` is a field of a dataclass, the settings of a command: its flags and checks follow.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.json_values import is_finite


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        help: what it says, for --help and the docs.
        default: its value where none is given; None where it follows from other settings.
        type: ``float`` (a positive number), ``int``, ``bool`` or ``str`` (one of ``choices``).
        choices: the words it may be.
        many: several values, a tuple.
        per_pair: one value per pair of rotated dimensions, a tuple; RoPE only.
        default_help: how the default follows from other settings, where it is None.
    """

    help: str
    default: Any = None
    type: type = float
    choices: tuple[str, ...] = ()
    many: bool = False
    per_pair: bool = False
    default_help: str = ""

    @property
    def full_help(self) -> str:
        """What it says and what it is by default."""
        default = self.default
        shown = self.default_help or (f"{default:g}" if self.type is float else f"{default}")
        return f"{self.help} (default: {shown})"

    def argument(self) -> dict[str, Any]:
        """Return the settings of its flag, for ``add_argument``; None stands for not given."""
        many = {"nargs": "+"} if self.many else {}
        choices = {"choices": self.choices} if self.choices else {}
        return {"type": self.type, "help": self.full_help, **choices, **many}

    def needed(self, value: Any) -> str | None:
        """Return what one value must be instead, None where it fits."""
        if self.choices:
            return None if value in self.choices else f"one of {self.choices}"
        if self.type is bool:
            return None if isinstance(value, bool) else "true or false"
        if not (is_finite(value) and value > 0):
            return "a positive number"
        if self.type is int and value != int(value):
            return "a whole number"
        return None


LARGEST_COUNT = (1 << 31) - 3
"""Tokens of a sequence, at most: with bos and eod, what an index has room for."""


def flag_field(
    help: str,
    *,
    group: str = "",
    default: Any = MISSING,
    type: Callable[[str], Any] | None = None,
    many: bool | str = False,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    action: Any = None,
    fewest: int = 1,
    most: int = LARGEST_COUNT,
) -> Any:
    """Declare a field of settings that is a flag of the command line too.

    Args:
        help: what the flag does.
        group: heading in ``--help``.
        default: MISSING for a flag that must be given.
        type: of a value on the command line; int where the default is one.
        many: whether it takes several values, a tuple; "*" for none too.
        metavar: stands for the value in ``--help``.
        choices: the values that it can have.
        action: how argparse stores it, where that does not follow from the default.
        fewest, most: limits of a number.
    """
    is_switch = isinstance(default, bool)
    type = int if type is None and isinstance(default, int) and not is_switch else type
    argument = {"help": help, "type": type, "metavar": metavar, "choices": choices}
    argument |= {"nargs": "+" if many is True else many or None, "action": action}
    if is_switch:
        argument = {"help": help, "action": action or "store_true"}
    argument = {key: value for key, value in argument.items() if value is not None}
    limits = {"type": type, "choices": choices, "fewest": fewest, "most": most}
    return field(default=default, metadata=limits | {"group": group, "argument": argument})


def add_flags(
    parser: argparse.ArgumentParser, settings: Any, without: Collection[str] = ()
) -> None:
    """Add a flag for each field of a class of settings that ``flag_field`` declared.

    Args:
        without: fields that this command has no flag for.
    """
    groups: dict[str, Any] = {"": parser}
    for found in fields(settings):
        if not found.metadata or found.name in without:
            continue
        group = found.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        given = found.default is not MISSING
        default = {"default": found.default} if given else {"required": True}
        words = {"dest": found.name, **default, **found.metadata["argument"]}
        groups[group].add_argument(flag_name(found.name), **words)


def read_flags(settings: Any, args: argparse.Namespace) -> Any:
    """Return the settings that ``add_flags`` took from a command line."""
    given = {found.name: getattr(args, found.name) for found in fields(settings)}
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def validate_fields(settings: Any) -> None:
    """Check each field of some settings against its limits and choices.

    Raises:
        UserError: naming the flag, the value and what it needs.
    """
    for found in fields(settings):
        value, choices = getattr(settings, found.name), found.metadata["choices"]
        if found.metadata["type"] is int:
            limits = found.metadata["fewest"], found.metadata["most"]
            validate_count(flag_name(found.name), value, *limits)
        if choices is not None and value not in choices and value != found.default:
            raise UserError(f"{flag_name(found.name)} {value}: needs one of {', '.join(choices)}")


def validate_count(flag: str, value: int | None, fewest: int, most: int = LARGEST_COUNT) -> None:
    """Check that a number is within ``fewest`` to ``most``; None is a flag that is not given.

    Raises:
        UserError: naming the flag, the value and what it needs.
    """
    if value is not None and not fewest <= value <= most:
        raise UserError(f"{flag} {value}: needs {fewest} to {most}")


def flag_name(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def parse_length(word: str) -> int:
    """Return tokens of ``4096`` or ``4K``.

    Raises:
        ArgumentTypeError: another form.
    """
    found = re.fullmatch(r"(\d{1,12})([kK]?)", word, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of tokens such as 4096 or 4K")
    return int(found[1]) * (1024 if found[2] else 1)
