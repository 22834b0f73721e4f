# SPDX-License-Identifier: Apache-2.0
"""Flags of RoPE, and the files that they name, as settings of an interpolation."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.rope.huggingface import scaling_from_hf
from megatron_cream.rope.lists import LongRopeScaling
from megatron_cream.rope.scaling import SCALINGS

FACTOR_LISTS = tuple(key for key, option in LongRopeScaling.OPTIONS.items() if option.per_pair)


def add_rope_flags(add: Callable[..., Any]) -> None:
    """Add the flags that one interpolation or another needs to an ``add_argument``."""
    add("--rope-theta", type=float, help="new theta, in place of the model's")
    add(
        "--rope-options",
        nargs="+",
        metavar="KEY=VALUE",
        help="settings of the interpolation, as config.json names them: beta_fast=32",
    )
    add("--rope-factors-file", help="JSON with longrope's short_factor and long_factor")


def options_from_args(args: Namespace) -> dict[str, Any]:
    """Return the interpolation's own settings out of the flags of ``add_rope_flags``.

    Raises:
        FileNotFoundError, ValueError: as ``parse_options`` and ``read_factors``.
    """
    options = parse_options(args.rope_options)
    return options | (read_factors(args.rope_factors_file) if args.rope_factors_file else {})


def parse_options(words: list[str] | None) -> dict[str, Any]:
    """Return ``{key: value}`` of ``KEY=VALUE`` words; values are numbers, true, false or words.

    Raises:
        UserError: a word of another form, or a key given twice.
    """
    options: dict[str, Any] = {}
    declared = [item for cls in SCALINGS.values() for item in cls.OPTIONS.items()]
    for word in words or ():
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise UserError(f"--rope-options has {word!r}: it must be KEY=VALUE")
        if key in options:
            raise UserError(f"--rope-options has {key} twice: once is enough")
        if any(key == name and text in option.choices for name, option in declared):
            options[key] = text
            continue
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            raise UserError(
                f"--rope-options has {word!r}: the value must be a number, true or false"
            ) from None
    return options


def read_factors(path: str) -> dict[str, list[float]]:
    """Return LongRoPE's lists out of a JSON file that has them, a config.json for instance.

    Raises:
        FileNotFoundError, ValueError: no such file, no JSON, or no lists in it.
    """
    values = _read_json("--rope-factors-file", path)
    values = values.get("rope_parameters") or values.get("rope_scaling") or values
    missing = [key for key in FACTOR_LISTS if key not in values]
    if missing:
        raise UserError(f"--rope-factors-file is {path}: it must have {' and '.join(missing)}")
    return {key: values[key] for key in FACTOR_LISTS}


def read_base(path: str) -> dict[str, Any]:
    """Return the settings of the scaling in a base model's config.json.

    Raises:
        FileNotFoundError, UserError: no such file, no JSON, or no RoPE that is known.
    """
    config = _read_json("--rope-base-config", path)
    try:
        return scaling_from_hf(config).settings()
    except UserError as error:
        raise UserError(f"--rope-base-config is {path}: {error}") from None


def _read_json(flag: str, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{flag} is {path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{flag} is {path}: it must be a JSON file") from None
    if not isinstance(values, dict):
        raise UserError(f"{flag} is {path}: it must hold a JSON object")
    return values
