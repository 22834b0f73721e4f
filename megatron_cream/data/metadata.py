# SPDX-License-Identifier: Apache-2.0
"""``PREFIX.json`` read back, checked: what preprocessing or merging wrote beside a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cream.errors import UserError

if TYPE_CHECKING:
    from megatron_cream.data.indexed import DatasetIndex

MOST_SHARDS = 99_999
"""Their numbers have five digits in a name."""


def read_metadata(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what tools/preprocess_data.py wrote beside the dataset, or None for another tool's.

    Raises:
        UserError: the file is there and is not what that tool writes.
    """
    path = Path(os.fspath(prefix) + ".json")
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc
    if not isinstance(note, dict):
        raise _damaged(path, f"it holds a {type(note).__name__}, not an object")
    for key, (check, needed, optional) in _KEYS.items():
        if key not in note:
            if optional:
                continue
            raise _damaged(path, f"it has no {key}")
        if not check(note[key]):
            raise _damaged(path, f"{key} is {_short(note[key])}, not {needed}")
    for key in ("eod_id", "bos_id"):
        if note[key] is not None and note[key] >= note["vocab_size"]:
            raise _damaged(path, f"{key} {note[key]} is outside vocab_size {note['vocab_size']}")
    return note


def check_fits(index: DatasetIndex, note: dict[str, Any] | None) -> None:
    """Refuse a note that is of other files than those it stands beside.

    Raises:
        UserError: naming what differs.
    """
    found = {
        "dtype": index.dtype.name,
        "documents": len(index.documents) - 1,
        "sequences": len(index.lengths),
        "tokens": int(index.lengths.sum(dtype="int64")),
    }
    for key, value in found.items():
        noted = value if note is None else note.get(key)
        if noted is not None and noted != value:
            raise UserError(
                f"{index.prefix}.json has {key} {noted} and {index.prefix}.idx has {value}, needs "
                "files of one dataset"
            )


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not what tools/preprocess_data.py writes beside a dataset ({why}), needs that "
        "file, or none"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
    )


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_is_count, value))
        and value[0] < value[1] <= MOST_SHARDS
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1 << 63


def _is_shares(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# What is read of a note: its check, what it needs to be, and whether it may be missing. A merged
# dataset has null for a limit on which its sources differ.
_KEYS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "tokenizer_type": (_is_text, "a text", False),
    "tokenizer_model": (_or_none(_is_text), "a text or null", False),
    "vocab_size": (_is_size, "1 or more", False),
    "eod_id": (_or_none(_is_count), "an id or null", False),
    "bos_id": (_or_none(_is_count), "an id or null", False),
    "appended_eod": (_is_bool, "true or false", False),
    "prepended_bos": (_is_bool, "true or false", False),
    "dropped": (_is_counts, "an object of counts", False),
    "dtype": (_or_none(_is_text), "a text", True),
    "documents": (_is_count, "a count", True),
    "sequences": (_is_count, "a count", True),
    "tokens": (_is_count, "a count", True),
    "errors": (_is_counts, "an object of counts", True),
    "listed_errors": (_is_pairs, "a list of pairs of texts", True),
    "longest_document": (_is_count, "a count", True),
    "mean_document": (_is_number, "a number", True),
    "median_document": (_is_number, "a number", True),
    "documents_by_length": (_is_counts, "an object of counts", True),
    "share_at_least": (_is_shares, "an object of shares", True),
    "fingerprint": (_or_none(_is_text), "a text or null", True),
    "shard": (_is_shard, "two numbers, I of N", True),
    "job": (_is_text, "a text", True),
    "thresholds": (_is_sizes, "a list of lengths", True),
    "drop_duplicates": (_is_bool, "true or false", True),
}
