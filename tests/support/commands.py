# SPDX-License-Identifier: Apache-2.0
"""A command's ``main`` as the shell sees it, and scripts as modules."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType


def exit_status(main: Callable[..., int | None], arguments: Sequence[str]) -> int:
    """Return the exit status, however the command ends: by returning it or by ``SystemExit``."""
    try:
        return main(arguments) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def load_file(path: str | Path) -> ModuleType:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
