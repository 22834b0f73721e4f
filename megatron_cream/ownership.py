# SPDX-License-Identifier: Apache-2.0
"""Makes working folders, and outputs that are whole or not there.

A folder is this tool's own, to be emptied or removed, only if a mark in it says so: a name such as
``X.parts`` or ``X.partial`` proves nothing, since a user may keep data under it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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


def validate_usable(folder: Path, kind: str, where: str) -> None:
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
        where: as ``validate_usable`` takes it.
        other: what to give in place of the value in ``where`` while another process has the folder.

    Raises:
        UserError: the folder is not this tool's, or of another kind.
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        validate_usable(folder, kind, where)
        folder.mkdir(exist_ok=True)
        opened = _opened_lock(folder, where, other)
        if opened is None:
            continue
        try:
            # Once more: what is there now stays as it is, since nobody else has the lock.
            validate_usable(folder, kind, where)
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
    validate_usable(folder, kind, f"removing {folder}")
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


def validate_prefix(prefix: str) -> None:
    """Check that an output names a file, in a place where a folder can be made.

    Raises:
        UserError: naming ``--output-prefix`` and what it needs.
    """
    where = f"--output-prefix {prefix}"
    folder, name = os.path.split(prefix)
    if name in ("", ".", ".."):
        raise UserError(f"{where}: names a folder, needs FOLDER/NAME")
    there = folder or "."
    while not os.path.lexists(there):
        there = os.path.dirname(there) or "."
    if not os.path.isdir(there):
        raise UserError(f"{where}: {there} is not a folder, needs one to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{where}: folder {there} needs to be writable")


_PARTIAL = ".partial"


@contextmanager
def staged(output: Path, needed_bytes: int, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a folder to write to, and rename it to ``output`` once everything in it is on the disk.

    It is ``OUTPUT.partial``, with a mark in it that is locked for this process. What an interrupted
    attempt left there is removed first if it has the mark of the same output, and what this one
    wrote is removed if it fails, so that its space is free again.

    Args:
        output: as ``validate_output`` returned it.
        needed_bytes: that will be written; an error before work starts if they do not fit.
        reads: folders that the work reads from.

    Raises:
        UserError: ``output`` holds something already, the place for unfinished work holds what is
            not this tool's or a folder of ``reads``, or the disk has too little space.
        BlockingIOError: another process is writing ``output``.
        OSError: the disk became full meanwhile, or failed; the message names ``output``.
    """
    output = validate_output(output, reads)
    partial, kind = _partial(output), _kind(output)
    held = lock(partial, kind, f"--output is {output}", "another folder")
    try:
        validate_output(output, reads)  # once more: another process may have finished it meanwhile
        empty(partial, kind)
        _validate_free_space(output, partial, needed_bytes)
        yield partial
        _sync_all(partial)
        # With its mark, so that a kill here leaves nothing that a rerun stumbles over: the mark
        # names this output, and so makes it nobody's place for unfinished work.
        os.rename(partial, output)
    except BaseException as error:
        remove(partial, kind)
        if _disk_is_full(error):
            raise OSError(
                errno.ENOSPC, f"--output is {output}: its disk became full; nothing was kept"
            ) from None
        raise
    finally:
        os.close(held)
    unmark(output)
    sync(output)
    sync(output.parent)


def _validate_free_space(output: Path, partial: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(partial).free
    if free < needed_bytes:
        raise UserError(
            f"--output is {output}: its disk has {free / 1e9:.2f} GB free, "
            f"{needed_bytes / 1e9:.2f} GB are needed"
        )


def validate_output(output: Path, reads: Iterable[Path] = ()) -> Path:
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
        validate_outside(folder, _partial(real), where)
    validate_usable(_partial(real), _kind(real), where)
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
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: str | Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str, data: bytes) -> None:
    """Write a file that is there with all of ``data`` or not at all, also after a power cut."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            sync_and_close(file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync(os.path.dirname(path) or ".")


def temporary_name(path: str) -> str:
    """Return a name beside ``path`` that no other process takes; ``claim`` deletes what is left."""
    return f"{path}-{uuid.uuid4().hex}.tmp"


def sync_and_close(file: BinaryIO) -> None:
    """Close a file once it is on the disk: a power cut must not leave a mark without its data."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
