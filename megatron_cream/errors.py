# SPDX-License-Identifier: Apache-2.0
"""Ends errors: those that a user can mend in one line, a bug with its traceback."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BAD_INPUT_STATUS = 2
"""Exit status of a command that was given something wrong."""

INTERRUPTED_STATUS = 128 + 2
"""Exit status of a command that control-C stopped: as a shell has it, of SIGINT."""

NO_READER_STATUS = 128 + 13
"""Exit status where nobody reads what is printed any more: as a shell has it, of SIGPIPE."""


class UserError(ValueError):
    """Input that the user can mend.

    The message names the flag or file, the value found and the value needed.
    """


class MissingPackageError(ImportError, UserError):
    """An optional package is not installed, or an installed one is of another version."""


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


@contextmanager
def name_damaged(place: object) -> Iterator[None]:
    """Turn what damaged bytes raise into one line: a UserError with their place.

    That may be any exception, as Python's documentation of pickle says: damaged bytes are still
    instructions, carried out up to where they make no sense.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{place} is damaged and cannot be read: {why}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a user's mistake in one line and with exit status 2; under torchrun it is 1.

    ``UserError`` and ``OSError`` (a file that is missing, a disk that is full) are the user's to
    mend. Everything else is a bug and keeps its traceback. Where the reader of standard output has
    gone (``| head``) the command ends without a word and with exit status 141; stopped by control-C
    it ends with 130.
    """
    try:
        with _printed_whole():
            yield
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            _drop_output()
            raise SystemExit(NO_READER_STATUS) from None
        _tell(" ".join(str(error).split()))
        raise SystemExit(BAD_INPUT_STATUS) from None
    except KeyboardInterrupt as stop:
        print("error: " + "; ".join(["interrupted", *stop.args]), file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED_STATUS) from None


@contextmanager
def _printed_whole() -> Iterator[None]:
    """Print what is left at the end, also at ``SystemExit``: Python's own end would only warn."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _has_no_reader() -> bool:
    """Whether standard output is a pipe that nobody reads; another's end may have broken."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file: a notebook's, or closed
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Have what is still to be printed go nowhere, so that Python's end does not fail at it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


_PATIENCE = 5.0  # seconds


def _tell(message: str) -> None:
    """Print an error once for all ranks, and have torchrun repeat it at the end of its report.

    Mostly every rank finds the same. The others wait for rank 0, at whose end torchrun ends them;
    who is left after that has an error of its own, or one of another node.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(_PATIENCE)
        message = f"rank {rank}: {message}"
    print("error:", message, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        report = {"message": f"error: {message}", "timestamp": int(time.time())}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(report, file)
