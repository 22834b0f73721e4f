# SPDX-License-Identifier: Apache-2.0
"""The flags that name datasets: read as Megatron reads them, refused where it only asserts."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError

_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
_WHOLE = ("data_path", "data_args_path")
_SPLITS = ("train", "valid", "test")


def validate_blend(args: Namespace) -> None:
    """Refuse lists of datasets and weights that Megatron cannot blend, and splits of nothing.

    Raises:
        UserError: naming the flag and the value in it.
        FileNotFoundError: a file that should hold the list.
    """
    ways = (*_WHOLE, *_PER_SPLIT, "per_split_data_args_path")
    given = [name for name in ways if getattr(args, name) is not None]
    if len(given) > 1 and not set(given) <= set(_PER_SPLIT):
        flags = " and ".join(map(_flag, given))
        raise UserError(f"{flags} are given: datasets must be named in one of these ways")
    for name in given:
        for words in _lists(name, getattr(args, name)):
            _refuse_words(_flag(name), words)
    if args.split is not None:
        _refuse_split(args.split)


def _flag(attribute: str) -> str:
    return f"--{attribute.replace('_', '-')}"


def _lists(name: str, value: Any) -> list[list[str]]:
    """Return the words of each list that a flag gives, or the file that it names."""
    if name == "data_args_path":
        return [Path(value).read_text(encoding="utf-8", errors="replace").split()]
    if name != "per_split_data_args_path":
        return [value]
    try:
        lists = json.loads(Path(value).read_text(encoding="utf-8"))
        found = [lists[split] for split in _SPLITS]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{_flag(name)} is {value}: it must be a JSON object with train, valid and test "
            f"({type(error).__name__}: {error})"
        ) from None
    return [one.split() if isinstance(one, str) else list(map(str, one or [])) for one in found]


def _refuse_words(flag: str, words: list[str]) -> None:
    if not words:
        raise UserError(f"{flag} is empty: it must name at least one dataset")
    weights = [_number(word) for word in words[::2]]
    if len(words) == 1 or not any(weight is not None for weight in weights):
        return  # prefixes alone
    if len(words) % 2 or any(weight is None for weight in weights):
        raise UserError(
            f"{flag} is {' '.join(words)}: it must be prefixes alone, or a weight before each of "
            "them: 0.3 A 0.7 B"
        )
    for weight, prefix in zip(weights, words[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"{flag} gives {prefix} the weight {weight:g}: it must be above 0; leave out a "
                "dataset that is not to be read"
            )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _refuse_split(split: str) -> None:
    parts = [_number(part) for part in split.split(",")]
    wrong = any(part is None or not math.isfinite(part) or part < 0 for part in parts)
    if wrong or len(parts) > len(_SPLITS) or not sum(parts):
        raise UserError(
            f"--split is {split!r}: it must be up to three shares, for training, validation and "
            "test, as 99,1,0"
        )
    if not parts[0]:
        raise UserError(f"--split is {split!r}: training's share, the first, must be above 0")
