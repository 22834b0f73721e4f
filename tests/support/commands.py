# SPDX-License-Identifier: Apache-2.0
"""A command's ``main`` as the shell sees it."""

from collections.abc import Callable, Sequence


def exit_status(main: Callable[..., int | None], arguments: Sequence[str]) -> int:
    """Return the exit status, however the command ends: by returning it or by ``SystemExit``."""
    try:
        return main(arguments) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
