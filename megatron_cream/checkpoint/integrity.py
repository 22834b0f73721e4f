# SPDX-License-Identifier: Apache-2.0
"""Is one iteration of a checkpoint whole? Its table, its files' sizes and its objects say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_cream.checkpoint.iterations import FORMAT_FILE, iterations, number, write_tracker
from megatron_cream.checkpoint.torch_dist_reader import lacking_files
from megatron_cream.checkpoint.torch_dist_table import Table, read_common, read_table
from megatron_cream.errors import UserError

FORMAT = "torch_dist"


def problems(folder: Path, objects: bool = True) -> Iterator[str]:
    """Yield what is wrong with an iteration, a line each, naming the file.

    Tensors are not read. No code from the checkpoint runs.

    Args:
        objects: read all objects, such as states of random numbers, and not the common state alone.
    """
    wrong = _wrong_format(folder)
    if wrong is not None:
        yield wrong
    try:
        table = read_table(folder)
    except (UserError, OSError) as error:
        yield str(error)
        return
    lacking = [str(error) for error in lacking_files(table)]
    yield from lacking
    if not lacking:  # or the same files would be named again
        yield from _wrong_objects(table, objects)


def check(folder: Path, flag: str, objects: bool = True) -> None:
    """Refuse an iteration that is not whole.

    Args:
        flag: and its value, what named the iteration.

    Raises:
        UserError: naming the file, and how to go on from the iteration before.
    """
    wrong = next(problems(folder, objects), None)
    if wrong is not None:
        raise UserError(f"{flag}: {wrong}; {go_on_before(folder, flag)}")


def go_on_before(folder: Path, flag: str) -> str:
    """Return how to go on from the newest whole iteration before ``folder``."""
    for path in reversed(iterations(folder.parent)):
        if path.name < folder.name and next(problems(path), None) is None:
            if flag.startswith("--checkpoint"):
                return f"{path.name} before it is whole: --checkpoint {shlex.quote(str(path))}"
            return (
                f"{path.name} before it is whole: go on from it with --ckpt-step {number(path)}, "
                f"or for good by: {write_tracker(path)}"
            )
    return f"{folder.parent} has no whole iteration before it"


def _wrong_format(folder: Path) -> str | None:
    path = folder / FORMAT_FILE
    if not path.is_file():
        return f"{folder} lacks {FORMAT_FILE}, which is written last: its save did not finish"
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != FORMAT:
        return f"{path} has sharded_backend {str(backend)[:40]!r}: it must be {FORMAT!r}"
    return None


def _wrong_objects(table: Table, all_of_them: bool) -> Iterator[str]:
    try:
        read_common(table)
    except (UserError, OSError) as error:
        yield str(error)
    for name in table.objects if all_of_them else ():
        try:
            if not name.startswith("common_state/"):
                table.read_object(name)
        except (UserError, OSError) as error:
            yield str(error)
