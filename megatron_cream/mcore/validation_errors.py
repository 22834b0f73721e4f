# SPDX-License-Identifier: Apache-2.0
"""Megatron's own validation of flags: its refusals in one line, its print-out left out."""

from __future__ import annotations

import io
import linecache
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from megatron_cream.errors import UserError
from megatron_cream.mcore.flag_ranges import flag_of

_ARGUMENT = re.compile(r"\bargs\.(\w+)")
_FIELD = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")
_PREFIXES = ("", "ddp_", "dist_ckpt_", "moe_", "optimizer_")  # a config's field to its flag
_BEGIN, _END = "- arguments -", "- end of arguments -"


@contextmanager
def megatron_validation_errors(
    args: Namespace | None = None, *, tell: bool = False
) -> Iterator[None]:
    """Turn what Megatron's own validation of flags raises into one line.

    Args:
        args: what is validated, whose values are told.
        tell: print what Megatron prints, but for its list of arguments.

    Raises:
        UserError: with Megatron's reason; of an assertion without words, what it asserts.
    """
    output = io.StringIO()
    try:
        with redirect_stdout(output):
            yield
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = _with_flags(str(error), args) if str(error) else _asserted(error, args)
        raise UserError(f"Megatron refuses these flags: {reason}") from None
    except SystemExit as error:
        if not error.code:  # it prints why and exits with 0
            raise UserError(f"Megatron refuses these flags: {_last_line(output)}") from None
        raise
    if tell:
        print(without_arguments(output.getvalue()), end="", flush=True)


def _with_flags(reason: str, args: Namespace | None) -> str:
    """Return a reason with the flags and values of the config fields that it names.

    Megatron's configs say ``num_buckets``; the flag may have the config's own prefix before it.
    """
    named = []
    for word in dict.fromkeys(_FIELD.findall(reason)):
        names = (prefix + word for prefix in _PREFIXES if hasattr(args, prefix + word))
        name = next(names, None)
        if name is not None and flag_of(name) not in reason:
            named.append(f"{flag_of(name)} is {getattr(args, name)}")
    return f"{reason} ({', '.join(named)})" if named else reason


def _asserted(error: BaseException, args: Namespace | None) -> str:
    """Return the condition of the source line that raised, with flags for attributes."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    numbers = range(frame.lineno, (frame.end_lineno or frame.lineno) + 1)
    source = " ".join(linecache.getline(frame.filename, number).strip() for number in numbers)
    condition = source.removeprefix("assert ").replace("\\", "").strip()
    names = dict.fromkeys(_ARGUMENT.findall(condition))
    values = [f"{flag_of(name)} is {getattr(args, name)}" for name in names if hasattr(args, name)]
    flags = _ARGUMENT.sub(lambda match: flag_of(match[1]), condition)
    return f"it needs {flags}" + (f", and {', '.join(values)}" if values else "")


def _last_line(output: io.StringIO) -> str:
    lines = output.getvalue().strip().splitlines()
    return lines[-1] if lines else "it exits without a reason"


def without_arguments(text: str) -> str:
    """Return what Megatron's validation printed without its list of some 850 arguments.

    There is no switch for the list. Whole it is in TensorBoard and in every checkpoint.
    """
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        begins, ends = _BEGIN in line, _END in line
        if not (inside or begins):
            kept.append(line)
        inside = (inside or begins) and not ends
    return "".join(kept)
