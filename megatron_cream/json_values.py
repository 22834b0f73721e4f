# SPDX-License-Identifier: Apache-2.0
"""Reads JSON files that others wrote, and values of theirs by type and range."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from megatron_cream.errors import UserError

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


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Put a file or folder before the message of a UserError about what is in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


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
