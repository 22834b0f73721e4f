# SPDX-License-Identifier: Apache-2.0
"""Folders that are either whole or not there: written aside, moved into place when done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cream import ownership
from megatron_cream.errors import UserError

_PARTIAL = ".partial"


@contextmanager
def staged(output: Path, needed_bytes: int, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a folder to write to, and rename it to ``output`` once everything in it is on the disk.

    It is ``OUTPUT.partial``, with a mark in it that is locked for this process. What an interrupted
    attempt left there is removed first if it has the mark of the same output, and what this one
    wrote is removed if it fails, so that its space is free again.

    Args:
        output: as ``check_output`` returned it.
        needed_bytes: what will be written, to be refused before work starts if it does not fit.
        reads: folders that the work reads from.

    Raises:
        UserError: ``output`` holds something already, the place for unfinished work holds what is
            not this tool's or a folder of ``reads``, or the disk has too little space.
        BlockingIOError: another process is writing ``output``.
        OSError: the disk became full meanwhile, or failed; the message names ``output``.
    """
    output = check_output(output, reads)
    partial, kind = _partial(output), _kind(output)
    lock = ownership.lock(partial, kind, f"--output is {output}", "another folder")
    try:
        check_output(output, reads)  # once more: another process may have finished it meanwhile
        ownership.empty(partial, kind)
        _refuse_full(output, partial, needed_bytes)
        yield partial
        _sync_all(partial)
        # With its mark, so that a kill here leaves nothing that a rerun stumbles over: the mark
        # names this output, and so makes it nobody's place for unfinished work.
        os.rename(partial, output)
    except BaseException as error:
        ownership.remove(partial, kind)
        if _disk_is_full(error):
            raise OSError(
                errno.ENOSPC, f"--output is {output}: its disk became full; nothing was kept"
            ) from None
        raise
    finally:
        os.close(lock)
    ownership.unmark(output)
    _sync(output)
    _sync(output.parent)


def _refuse_full(output: Path, partial: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(partial).free
    if free < needed_bytes:
        raise UserError(
            f"--output is {output}: its disk has {free / 1e9:.2f} GB free, "
            f"{needed_bytes / 1e9:.2f} GB are needed"
        )


def check_output(output: Path, reads: Iterable[Path] = ()) -> Path:
    """Return where ``output`` is, links followed, if a new folder can be made there.

    Raises:
        UserError: it holds something, cannot be replaced, or the place for unfinished work beside
            it holds what is not this tool's or a folder of ``reads``.
    """
    where = f"--output is {output}"
    if str(output) in ("", "."):
        raise UserError(f"{where}: it must be a new or an empty folder")
    real = Path(os.path.realpath(output))
    if real.exists() and (not real.is_dir() or any(real.iterdir())):
        raise UserError(f"{where}: it exists; it must be a new or an empty folder")
    if os.path.ismount(real):
        raise UserError(f"{where}: a disk is mounted there; it must be a folder on that disk")
    for folder in reads:
        ownership.validate_outside(folder, _partial(real), where)
    ownership.check_usable(_partial(real), _kind(real), where)
    return real


def _partial(output: Path) -> Path:
    return output.with_name(output.name + _PARTIAL)


def _kind(output: Path) -> str:
    """Of the mark: another output's unfinished work is not this one's to remove."""
    return f"conversion to {output.name}"


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether that is what an error began with: torch's writer raises its own on top."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
