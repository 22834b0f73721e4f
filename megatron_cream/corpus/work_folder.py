# SPDX-License-Identifier: Apache-2.0
"""The folder of an unfinished job: one process at a time, one job, and no part of another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from megatron_cream import ownership
from megatron_cream.corpus.job import Job
from megatron_cream.corpus.publish import is_whole, write_whole
from megatron_cream.errors import UserError

PREPROCESSING, MERGING, RETRIEVAL = "preprocessing", "merging", "retrieval"
"""Kinds of jobs, as they stand in the mark of a folder."""

_JOB, _STAGED = "job.json", "data"


class WorkFolder:
    """``PREFIX.parts``, locked for this process until it is closed.

    The lock is on the mark that says that this tool made the folder. The folder of the output is
    made if it is missing.

    Args:
        prefix: the output.
        kind: of the job, one of the constants above.

    Raises:
        UserError: there is such a folder, and it is not of an unfinished job of this kind.
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """

    def __init__(self, prefix: str, kind: str) -> None:
        self.prefix, self.kind = prefix, kind
        self.path = Path(prefix + ".parts")
        self._removed = False
        where = f"--output-prefix {prefix}"
        self._lock = ownership.lock(self.path, kind, where, "another prefix")

    @property
    def staged(self) -> str:
        """Where the files of the dataset are made, without suffix."""
        return str(self.path / _STAGED)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        """Keep what was finished; a folder without any of it goes."""
        try:
            if not self._removed and not any(self.path.glob("*-*.json")) and not self.is_whole():
                self.remove()
        finally:
            os.close(self._lock)

    def let_go(self) -> None:
        """In a forked worker: close its copy of the lock, which is to end with this process."""
        os.close(self._lock)

    def is_whole(self) -> bool:
        """Say whether a whole dataset is here that was not, or in part, moved to its place."""
        return is_whole(self.staged)

    def is_of(self, job: Job) -> bool:
        """Say whether ``job`` is the one whose parts are here."""
        return self._found() == _settings(job)

    def claim(self, job: Job, *, restart: bool) -> int:
        """Make the folder this job's; returns how many parts it has already.

        Args:
            job: the job.
            restart: whether what another job left is deleted.

        Raises:
            UserError: it holds parts of another job.
        """
        found = None if restart else self._found()
        if found is None:
            ownership.empty(self.path, self.kind)
        elif found != _settings(job):
            _refuse_other(self.prefix, self.path, found, _settings(job))
        write_whole(str(self.path / _JOB), json.dumps(_settings(job)).encode())
        for pattern in (f"{_STAGED}.*", "*.tmp"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        return len(list(self.path.glob("*-*.json")))

    def remove(self) -> None:
        """Delete the folder; a new process may make it again at once."""
        ownership.remove(self.path, self.kind)
        self._removed = True

    def drop_unit(self, unit: int) -> None:
        """Delete the parts of a unit whose input cannot be read a second time."""
        for path in self.path.glob(f"{unit:08d}-*"):
            path.unlink()

    def _found(self) -> dict[str, Any] | None:
        """The settings of the job whose parts are here, None without one."""
        path = self.path / _JOB
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"--output-prefix {self.prefix}: {path} is damaged, needs --restart to begin anew"
            )
        return found


def _settings(job: Job) -> dict[str, Any]:
    return json.loads(json.dumps({**job.settings(), "shard": job.shard}))


def _refuse_other(
    prefix: str, folder: Path, found: dict[str, Any], wanted: dict[str, Any]
) -> NoReturn:
    name = next((name for name in wanted if found.get(name) != wanted[name]), "version")
    raise UserError(
        f"--output-prefix {prefix}: {folder} holds an unfinished job with another {name} "
        f"({_short(found.get(name))}, this one {_short(wanted.get(name))}); needs the same "
        "settings to continue, or --restart"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
