# SPDX-License-Identifier: Apache-2.0
"""The folder of an unfinished job: one process at a time, one job, and no part of another."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from megatron_cream.data.plan import Job
from megatron_cream.data.publish import MARK, is_whole, write_whole
from megatron_cream.errors import UserError

_JOB, _LOCK, _STAGED = "job.json", "lock", "data"


class WorkFolder:
    """``PREFIX.parts``, locked for this process until it is closed.

    Args:
        prefix: the output.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = Path(prefix + ".parts")
        self._lock = self._locked()

    @property
    def staged(self) -> str:
        """Where the files of the dataset are made, without suffix."""
        return str(self.path / _STAGED)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        """Keep what was finished; a folder without any of it goes."""
        if self.path.is_dir() and not any(self.path.glob("*-*.json")) and not self.is_whole():
            self.remove()
        os.close(self._lock)

    def let_go(self) -> None:
        """In a forked worker: close its copy of the lock, which is to end with this process."""
        os.close(self._lock)

    def is_whole(self) -> bool:
        """Say whether a whole dataset is here, perhaps in part moved to its place already."""
        return is_whole(self.staged)

    def is_of(self, job: Job) -> bool:
        """Say whether ``job`` is the one whose parts are here."""
        path = self.path / _JOB
        return path.exists() and json.loads(path.read_text()) == _settings(job)

    def claim(self, job: Job, *, restart: bool) -> int:
        """Make the folder this job's; returns how many parts it has already.

        Args:
            job: the job.
            restart: whether what another job left is deleted.

        Raises:
            UserError: it holds parts of another job.
        """
        path = self.path / _JOB
        if not path.exists() or restart:
            self._clear()
        elif not self.is_of(job):
            _refuse_other(self.prefix, self.path, json.loads(path.read_text()), _settings(job))
        write_whole(str(path), json.dumps(_settings(job)).encode())
        for pattern in (f"{_STAGED}.*", "*.tmp"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        return len(list(self.path.glob("*-*.json")))

    def remove(self) -> None:
        """Delete the folder; a new process may make it again at once."""
        self._clear(keep=_STAGED + MARK)
        (self.path / (_STAGED + MARK)).unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        self.path.rmdir()

    def drop_unit(self, unit: int) -> None:
        """Delete the parts of a unit whose input cannot be read a second time."""
        for path in self.path.glob(f"{unit:08d}-*"):
            path.unlink()

    def _clear(self, keep: str = "") -> None:
        for entry in self.path.iterdir():
            if entry.name not in (_LOCK, keep):
                entry.unlink()

    def _locked(self) -> int:
        while True:
            self.path.mkdir(exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process before may have deleted the file between the two calls.
                if os.path.samestat(os.fstat(lock), os.stat(self.path / _LOCK)):
                    return lock
            except FileNotFoundError:
                pass
            except BlockingIOError as exc:
                os.close(lock)
                raise BlockingIOError(
                    f"--output-prefix {self.prefix}: another process is writing it "
                    f"({self.path / _LOCK} is locked), needs it to end or another prefix"
                ) from exc
            os.close(lock)


def _settings(job: Job) -> dict[str, Any]:
    return json.loads(json.dumps({**job.settings(), "shard": job.shard}))


def _refuse_other(
    prefix: str, folder: Path, found: dict[str, Any], wanted: dict[str, Any]
) -> NoReturn:
    name = next(name for name in wanted if found.get(name) != wanted[name])
    raise UserError(
        f"--output-prefix {prefix}: {folder} holds an unfinished job with another {name} "
        f"({_short(found.get(name))}, this one {_short(wanted[name])}); needs the same settings "
        "to continue, or --restart"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
