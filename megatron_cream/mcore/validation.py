# SPDX-License-Identifier: Apache-2.0
"""Validates Megatron's flags: one by one by the table of arguments, then by Megatron itself.

Errors of its parser and of its validation come in one line, without the list of all flags.
"""

from __future__ import annotations

import copy
import io
import linecache
import re
import traceback
from argparse import Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import ARGUMENTS, Reason, flag_of
from megatron_cream.options import is_finite


def make_readable(parser: ArgumentParser) -> ArgumentParser:
    """Have a parser of some 800 flags say what is wrong without listing them all.

    ``--help`` lists them, one of whose texts in Megatron 0.19.2 has a ``%`` that argparse cannot
    format.
    """
    parser.formatter_class = _Formatter
    parser.usage = "%(prog)s [Megatron-Core's flags] [megatron_cream's flags]"
    parser.error = _raise_error  # type: ignore[method-assign]
    return parser


def _raise_error(message: str) -> NoReturn:
    raise UserError(message)


class _Formatter(HelpFormatter):
    """Prints a text as it is where its ``%`` makes no format."""

    def _expand_help(self, action: Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def validate_required(args: Namespace) -> None:
    """Refuse a command line without what every run needs.

    Raises:
        UserError: naming the flag.
    """
    for row in ARGUMENTS.values():
        spared = row.unless is not None and getattr(args, row.unless)
        asked = row.where is None or getattr(args, row.where) is not None
        if row.required and asked and not spared and getattr(args, row.name) is None:
            raise UserError(f"{flag_of(row.name)} is missing: {row.required}")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise UserError("--wandb-save-dir is missing: with --wandb-project it or --save is needed")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing: iterations of the run, or give --train-samples")


def validate_ranges(args: Namespace) -> None:
    """Refuse numbers that no run can have: Megatron fails on them after its start.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for row in ARGUMENTS.values():
        value = getattr(args, row.name, None)
        if row.range and value is not None and not (is_finite(value) and row.range.holds(value)):
            raise UserError(f"{flag_of(row.name)} is {value}: it must be {row.range.needed}")
    if args.window_size is not None and len(args.window_size) != 2:
        raise UserError(
            f"--window-size is {','.join(map(str, args.window_size))}: it must be two numbers, of "
            "tokens before and after, as 4096,0"
        )


def validate_left_out(args: Namespace, fact: Reason = "refused", beside: str = "") -> None:
    """Refuse arguments that a run cannot have, or that nothing here reads.

    Args:
        fact: of the table, which says why.
        beside: for the message, what they do not go with.

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    for row in ARGUMENTS.values():
        why = getattr(row, fact)
        if why and not row.is_left_out(args):
            found = f"{flag_of(row.name)} is {getattr(args, row.name)}{beside}"
            raise UserError(f"{found}: it must be left out, {why}")


_ARGUMENT = re.compile(r"\bargs\.(\w+)")
_FIELD = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")
_PREFIXES = ("", "ddp_", "dist_ckpt_", "moe_", "optimizer_")  # a config's field to its flag
_LEFT_OUT = (
    r"^[^\n]*- arguments -.*?- end of arguments -[^\n]*\n?",  # some 850, without a switch
    r"^WARNING: one_logger package is required[^\n]*\n",  # by a page inside NVIDIA
    r"^WARNING: TensorBoard writing requested[^\n]*\n",  # by another cause; the start block says it
)


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
        print(shortened(output.getvalue()), end="", flush=True)


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
    first = frame.lineno or 0
    numbers = range(first, (frame.end_lineno or first) + 1)
    source = " ".join(linecache.getline(frame.filename, number).strip() for number in numbers)
    condition = source.removeprefix("assert ").replace("\\", "").strip()
    names = dict.fromkeys(_ARGUMENT.findall(condition))
    values = [f"{flag_of(name)} is {getattr(args, name)}" for name in names if hasattr(args, name)]
    flags = _ARGUMENT.sub(lambda match: flag_of(match[1]), condition)
    return f"it needs {flags}" + (f", and {', '.join(values)}" if values else "")


def _last_line(output: io.StringIO) -> str:
    lines = output.getvalue().strip().splitlines()
    return lines[-1] if lines else "it exits without a reason"


def shortened(text: str) -> str:
    """Return what Megatron's validation printed without what tells a user nothing.

    Its list of arguments is whole in TensorBoard and in every checkpoint.
    """
    return re.sub("|".join(_LEFT_OUT), "", text, flags=re.MULTILINE | re.DOTALL)


def validate_with_megatron(args: Namespace, defaults: dict[str, Any]) -> Namespace:
    """Return a copy of parsed arguments that Megatron has validated and completed.

    Args:
        args: as parsed; not changed.
        defaults: a script's own, as Megatron's validation takes them.

    Raises:
        UserError: with Megatron's reason.
    """
    from megatron.training.arguments import validate_args

    validated = copy.deepcopy(args)
    validated.calculate_per_token_loss = True  # as training will; pretrain.py says why
    with megatron_validation_errors(validated):
        validate_args(validated, defaults)
    return validated


def validate_model_config(validated: Namespace) -> None:
    """Make the configs that Megatron makes of its flags, which check more of them.

    Raises:
        UserError: with Megatron's reason.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.mcore.hooks import megatron_config

    args = copy.deepcopy(validated)
    with megatron_validation_errors(args):
        pretrain_cfg_container_from_args(args, megatron_config(args))
