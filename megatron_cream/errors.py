# SPDX-License-Identifier: Apache-2.0
"""How errors end: what a user can mend in one line, a bug with its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT_STATUS = 2
"""Exit status of a command that was given something wrong."""


class UserError(ValueError):
    """Input that the user can mend.

    The message names the flag or file, the value found and the value needed.
    """


class MissingPackageError(ImportError, UserError):
    """An optional package is not installed, or an installed one is of another version."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a user's mistake in one line on rank 0 and with exit status 2.

    ``UserError`` and ``OSError`` (a file that is missing, a disk that is full) are the user's to
    mend. Everything else is a bug and keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT_STATUS) from None
