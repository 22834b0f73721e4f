# SPDX-License-Identifier: Apache-2.0
"""What each setting of a preprocessing job may be, looked at one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cream.corpus.engine import ENGINES
from megatron_cream.corpus.inputs import ARROW, FORMATS, PARQUET, STDIN
from megatron_cream.data.metadata import MOST_SHARDS
from megatron_cream.errors import UserError

if TYPE_CHECKING:
    from megatron_cream.corpus.settings import PreprocessConfig

LARGEST_COUNT = (1 << 31) - 3
"""Tokens of a sequence, at most: with bos and eod, what an index has room for."""

_MOST_WORKERS = 4096
_LARGEST_PART = 1 << 40
_MOST_PARTS = 1_000_000


def check_values(config: PreprocessConfig) -> None:
    """Refuse a setting that cannot work, whatever the input is.

    Raises:
        UserError: naming the flag, the value and what it needs.
    """
    check_count("--workers", config.workers, fewest=1, most=_MOST_WORKERS)
    check_count("--min-tokens", config.min_tokens, fewest=1)
    check_count("--max-tokens", config.max_tokens, fewest=1)
    check_count("--seq-length", config.seq_length, fewest=1)
    check_count("--target-length", config.target_length, fewest=1)
    check_count("--part-bytes", config.part_bytes, fewest=1, most=_LARGEST_PART)
    check_count("--verify", config.verify, fewest=-1)
    _check_choices(config)
    if config.max_tokens is not None and config.max_tokens < config.min_tokens:
        raise UserError(
            f"--max-tokens {config.max_tokens}: needs at least --min-tokens, {config.min_tokens}"
        )
    if config.long_documents == "drop" and config.max_tokens is None:
        raise UserError("--long-documents drop: needs --max-tokens")
    index, count = config.shard
    check_count(f"--shard {index}/{count}: a count of", count, fewest=1, most=MOST_SHARDS)
    if not 0 <= index < count:
        raise UserError(f"--shard {index}/{count}: needs 0/{count} to {count - 1}/{count}")
    if not config.fields().names:
        raise UserError("--json-key: needs at least one name")
    _check_standard_input(config)
    if config.ray is not None:
        from megatron_cream.corpus.ray_executor import import_ray

        import_ray()


def check_count(flag: str, value: int | None, fewest: int, most: int = LARGEST_COUNT) -> None:
    """Refuse a number outside ``fewest`` to ``most``; None is a flag that is not given."""
    if value is not None and not fewest <= value <= most:
        raise UserError(f"{flag} {value}: needs {fewest} to {most}")


def check_part_bytes(config: PreprocessConfig, total_bytes: int) -> None:
    """Refuse parts so small that their files would be too many for a folder."""
    if total_bytes // config.part_bytes > _MOST_PARTS:
        raise UserError(
            f"--part-bytes {config.part_bytes}: cuts the input into more than {_MOST_PARTS} parts, "
            f"needs {-(-total_bytes // _MOST_PARTS)} or more"
        )


def _check_choices(config: PreprocessConfig) -> None:
    choices = (
        ("--long-documents", config.long_documents, ("split", "drop")),
        ("--on-error", config.on_error, ("fail", "skip")),
        ("--engine", config.engine, ENGINES),
        ("--input-format", config.input_format, (None, *FORMATS)),
    )
    for flag, value, allowed in choices:
        if value not in allowed:
            names = ", ".join(name for name in allowed if name)
            raise UserError(f"{flag} {value}: needs one of {names}")


def _check_standard_input(config: PreprocessConfig) -> None:
    if str(STDIN) not in config.input:
        return
    if config.workers > 1 or config.ray is not None or config.shard[1] > 1:
        raise UserError(
            "--input -: standard input is read by one process, needs --workers 1 without --shard "
            "and --ray"
        )
    if config.input_format in (PARQUET, ARROW):
        raise UserError(f"--input -: cannot be {config.input_format}, needs jsonl or text")
