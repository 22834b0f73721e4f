# SPDX-License-Identifier: Apache-2.0
"""Declares settings once, each with its flag, help and limits; reads those of JSON files.

``Option`` is one setting of a position strategy or of a RoPE interpolation, declared on its class:
flags, their help, checks, checkpoint settings and the tables of the docs follow from it.
``flag_field`` is a field of a dataclass, the settings of a command: its flags and checks follow.
What others wrote into a config.json is read by type and range.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, overload

from megatron_cream.errors import UserError, reason


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


MOST = 2**31 - 1
"""Largest size that is taken for one: dimensions and positions are 32 bits wide further on."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it does not; the message names the file.
        OSError: there is no such file, or it cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: it holds {reprlib.repr(content)}")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is none; the message names the file.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        why = "it is empty" if path.stat().st_size == 0 else reason(error)
        raise UserError(f"{path} is not JSON: {why}") from None


@overload
def integer(values: dict[str, Any], key: str, default: int, most: int = MOST) -> int: ...
@overload
def integer(
    values: dict[str, Any], key: str, default: None = None, most: int = MOST
) -> int | None: ...
def integer(
    values: dict[str, Any], key: str, default: int | None = None, most: int = MOST
) -> int | None:
    """Return a positive integer of config.json, or ``default`` where it says none.

    Raises:
        UserError: another type, or a value outside 1 to ``most``.
    """
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(
            f"{key} in config.json is {reprlib.repr(value)}: it must be a positive integer of at "
            f"most {most}"
        )
    return value


@overload
def number(values: dict[str, Any], key: str, default: float, least: float = 0.0) -> float: ...
@overload
def number(
    values: dict[str, Any], key: str, default: None = None, least: float = 0.0
) -> float | None: ...
def number(
    values: dict[str, Any], key: str, default: float | None = None, least: float = 0.0
) -> float | None:
    """Return a finite number of config.json above ``least``, or ``default`` where it says none.

    Raises:
        UserError: another type, NaN, infinite, or too small.
    """
    value = values.get(key)
    if value is None:
        return default
    if not is_finite(value) or value <= least:
        raise UserError(
            f"{key} in config.json is {reprlib.repr(value)}: it must be a finite number above "
            f"{least:g}"
        )
    return float(value)


def flag(values: dict[str, Any], key: str) -> bool:
    """Return a true or false of config.json; false where it says none.

    Raises:
        UserError: another type.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} in config.json is {reprlib.repr(value)}: it must be true or false")
    return bool(value)


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
