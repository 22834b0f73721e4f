# SPDX-License-Identifier: Apache-2.0
"""Working folders: one is this tool's own, to be emptied or removed, only if a mark in it says so.

A name such as ``X.parts`` or ``X.partial`` proves nothing: a user may keep data under it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from megatron_cream.errors import UserError

MARK_NAME = ".megatron_cream.json"
_TOOL = "megatron_cream"


def mark(folder: Path, kind: str) -> None:
    """Write into ``folder`` that this tool made it, for a job of ``kind``.

    The file is written on its own, before anything else in the folder: a process that is killed
    meanwhile leaves a folder that holds nothing but a mark, which counts as empty.
    """
    text = json.dumps({"made_by": _TOOL, "kind": kind}) + "\n"
    (folder / MARK_NAME).write_text(text, encoding="utf-8")


def unmark(folder: Path) -> None:
    """Make a folder the user's: what is in it is then never removed by this tool."""
    (folder / MARK_NAME).unlink(missing_ok=True)


def marked_kind(folder: Path) -> str | None:
    """Return the kind of job that ``folder`` was made for; None if this tool did not make it.

    A link is never this tool's own, wherever it points.
    """
    try:
        if folder.is_symlink():
            return None
        content = json.loads((folder / MARK_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != _TOOL:
        return None
    kind = content.get("kind")
    return kind if isinstance(kind, str) else None


def check_usable(folder: Path, kind: str, where: str) -> None:
    """Refuse a working folder unless it is absent, empty, or of an earlier job of ``kind``.

    Args:
        folder: where a job is to keep unfinished work.
        kind: of the job.
        where: flag and value that ask for it, to begin the message with.

    Raises:
        UserError: it is a link, not a folder, holds something else, or a job of another kind.
    """
    if folder.is_symlink():
        raise UserError(f"{where}: {folder} is a link, needs a name where a folder can be made")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{where}: {folder} is a file, needs a name where a folder can be made")
    found = marked_kind(folder)
    if found == kind or _is_empty(folder):
        return
    if found is not None:
        raise UserError(
            f"{where}: {folder} holds an unfinished job of another kind ({found}, this one "
            f"{kind}), needs that job to be finished, that folder removed, or another output"
        )
    other = min(name for name in os.listdir(folder) if name != MARK_NAME)
    raise UserError(
        f"{where}: {folder} holds {other} and was not made by this tool, needs that folder to be "
        "moved away, or another output"
    )


def lock(folder: Path, kind: str, where: str, other: str) -> int:
    """Make a working folder, or take an earlier job's of ``kind``, for this process alone.

    The lock is on the mark. It ends when the file descriptor that is returned is closed, or with
    the process.

    Args:
        where: as ``check_usable`` takes it.
        other: what to give in place of the value in ``where`` while another process has the folder.

    Raises:
        UserError: the folder is not this tool's, or of another kind.
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        check_usable(folder, kind, where)
        folder.mkdir(exist_ok=True)
        opened = _opened_lock(folder, where, other)
        if opened is None:
            continue
        try:
            # Once more: what is there now stays as it is, since nobody else has the lock.
            check_usable(folder, kind, where)
            if marked_kind(folder) != kind:
                mark(folder, kind)
        except BaseException:
            os.close(opened)
            raise
        return opened


def _opened_lock(folder: Path, where: str, other: str) -> int | None:
    """The mark, opened and locked; None where another process has deleted it meanwhile."""
    path = folder / MARK_NAME
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(opened), os.stat(path)):
            return opened
    except FileNotFoundError:
        pass
    except BlockingIOError as exc:
        os.close(opened)
        raise BlockingIOError(
            f"{where}: another process is writing it ({path} is locked), needs it to end or {other}"
        ) from exc
    os.close(opened)
    return None


def remove(folder: Path, kind: str) -> None:
    """Delete a folder and all in it, if it is marked as made for a job of ``kind``, mark last.

    An absent folder is fine; so is one that is empty, which goes.

    Raises:
        UserError: it is not this tool's own.
    """
    empty(folder, kind)
    if folder.exists():
        unmark(folder)
        folder.rmdir()


def empty(folder: Path, kind: str) -> None:
    """Delete all in a folder but its mark; absent and foreign ones as ``remove``."""
    check_usable(folder, kind, f"removing {folder}")
    if not folder.exists():
        return
    for entry in os.scandir(folder):
        if entry.name == MARK_NAME:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def validate_outside(path: str | os.PathLike[str], folder: Path, where: str) -> None:
    """Refuse an input that lies in the working folder of an output, links followed.

    Raises:
        UserError: ``path`` is ``folder`` or below it.
    """
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real == place or place in real.parents:
        raise UserError(
            f"{where}: {path} is in {folder}, where unfinished work is kept, needs another output"
        )


def _is_empty(folder: Path) -> bool:
    return not set(os.listdir(folder)) - {MARK_NAME}
