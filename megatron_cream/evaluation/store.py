# SPDX-License-Identifier: Apache-2.0
"""Keeps a run in a folder: its settings, every finished case at once, the results at the end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_cream
from megatron_cream.checkpoint.iterations import find_checkpoint
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.result_files import ScoreFormat, read_object, read_records
from megatron_cream.evaluation.results import table
from megatron_cream.positions.plots import has_matplotlib

if TYPE_CHECKING:
    from megatron_cream.evaluation.forward import ScoringModel

SETTINGS_FILE, CASES_FILE, RESULT_FILE = "settings.json", "cases.jsonl", "result.json"
_SEAL = "seal"  # key of a line of CASES_FILE: hash of the line and of the settings it was made with
CONTENT = ("cases_file_content", "data_content")
"""Hashes of what a run read; settings that runs of older versions lack."""


class ResultStore:
    """A run's folder, made or continued; locked for this process until it is closed.

    Args:
        folder: OUTPUT; None keeps nothing.
        settings: what decides the results; a run is continued with the same ones only.
        kind: what a record has, and what tells two of them apart.
        primary: whether this process writes; the others read.

    Raises:
        UserError: the folder has a run of other settings, something else, or damaged files.
        BlockingIOError: another process writes to the folder.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: dict[str, Any],
        kind: ScoreFormat,
        primary: bool = True,
    ) -> None:
        self.primary = primary and folder is not None
        self.settings = json.loads(json.dumps(settings))  # as they are read again
        self.kind = kind
        self.finished: list[dict[str, Any]] = []
        self._lock: int | None = None
        decide = {k: v for k, v in self.settings.items() if v is not None and k not in CONTENT}
        self._decide = json.dumps(decide, sort_keys=True).encode()
        if folder is not None:
            self.folder = Path(folder)
            if self.primary:
                self._open()
            try:
                self.finished = self._read()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self) -> None:
        path = self.folder / SETTINGS_FILE
        other = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if other and not path.is_file():
            raise self._other_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        # The settings are the lock as well: the folder has no file that is not the run's.
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock_settings(path, self._lock)
        except BaseException:
            self.close()
            raise

    def _lock_settings(self, path: Path, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"--output is {self.folder}: another process writes its results there ({path} is "
                "locked); wait until it has ended, or take another folder"
            ) from None
        if os.fstat(lock).st_size:
            _validate_same(read_object(path, "--output"), self.settings, self.folder)
            return
        if {entry.name for entry in self.folder.iterdir()} != {SETTINGS_FILE}:
            raise self._other_folder()
        try:
            with open(os.dup(lock), "wb") as file:
                file.write(_json(self.settings))
        except OSError:
            os.truncate(lock, 0)  # a full disk: half of them would be taken for damaged
            raise

    def _other_folder(self) -> UserError:
        return UserError(
            f"--output is {self.folder}: it must be a new folder, or that of a run to continue"
        )

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / CASES_FILE
        if not path.is_file():
            return []
        # A killed run may have left half a line, which is done again.
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if self.primary and len(whole) < len(text):
            os.truncate(path, len(whole))
        records = read_records(path, whole, self.kind)
        for number, record in enumerate(records, 1):
            seal = record.pop(_SEAL, None)  # runs of older versions have none
            if seal not in (None, self._seal(record)):
                raise UserError(
                    f"--output is {self.folder}: line {number} of {CASES_FILE} is not what this "
                    f"run wrote: it was changed, or made with other settings than {SETTINGS_FILE} "
                    "has; take another folder, or delete that line, whose case is then scored again"
                )
        return records

    def _seal(self, record: dict[str, Any]) -> str:
        words = json.dumps(record, sort_keys=True).encode()
        return hashlib.sha256(self._decide + words).hexdigest()[:12]

    @property
    def done(self) -> set[tuple[Any, ...]]:
        """The identities of the finished records."""
        return set(map(self.kind.identity, self.finished))

    def validate_finished(self, lengths: set[int], known: set[tuple[Any, ...]]) -> None:
        """Refuse finished records of ``lengths`` that are not among those that the run makes.

        Raises:
            UserError: naming the first one.
        """
        for record in self.finished:
            if record["length"] in lengths and self.kind.identity(record) not in known:
                raise UserError(
                    f"--output is {self.folder}: {CASES_FILE} has {self.kind.name(record)}, "
                    "which this run does not make; take another folder"
                )

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write finished records down, now."""
        self.finished += records
        if self.primary:
            lines = (json.dumps({**record, _SEAL: self._seal(record)}) + "\n" for record in records)
            with open(self.folder / CASES_FILE, "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def finish(self, found: dict[str, Any], draw: bool = True) -> dict[str, Any]:
        """Return what was found, behind the settings; write it with its table and picture.

        Its ``versions`` are those of the packages that made it. Without ``draw`` there is no
        picture: of a run that goes on.
        """
        result = self.settings | found | {"versions": _versions()}
        if self.primary:
            write_whole(self.folder / RESULT_FILE, _json(result))
            write_table(self.folder, table(result), [result] if draw else [])
        return result


def _versions() -> dict[str, str]:
    """Return the versions of what decides figures, as far as it is installed."""
    found = {"megatron_cream": megatron_cream.__version__, "python": platform.python_version()}
    for package in ("megatron-core", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that a kill leaves whole: as it was before, or with all of ``data``."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_table(folder: Path, text: str, results: Sequence[dict[str, Any]]) -> None:
    """Write a table of results and, where matplotlib is installed, a picture of ``results``."""
    write_whole(folder / "table.md", (text + "\n").encode())
    if results and has_matplotlib():
        from megatron_cream.evaluation.pictures import draw

        draw(results, folder / "picture.png")


def note_missing_matplotlib() -> None:
    """Print one line that there is no picture, where matplotlib is not installed."""
    if not has_matplotlib():
        print(
            "note: no picture.png, a picture needs matplotlib: pip install matplotlib, and start "
            "the same command again",
            file=sys.stderr,
        )


def _validate_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    added = [key for key in CONTENT if key not in before]
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in added]
    if keys:
        differences = ", ".join(f"{key} {before.get(key)} != {now.get(key)}" for key in keys)
        raise UserError(
            f"--output is {folder}: it has a run of other settings ({differences}); take another "
            "folder, or the same settings to continue it"
        )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def open_store(
    settings: EvaluationSettings,
    model: ScoringModel,
    task: str,
    own: dict[str, Any],
    kind: ScoreFormat,
) -> ResultStore:
    """Return the store of a task's results, in its folder if there is one.

    Args:
        own: what decides the results beside the model. Not the lengths: a run may be continued
            with more of them.
    """
    decisive = {
        "task": task,
        "name": settings.name or Path(model.name).name,
        "model": model.name,
        "window": model.window,
        "weights": hash_files(model.name),
        **model.settings,
        **own,
    }
    return ResultStore(settings.folder(task), decisive, kind, model.primary)


def hash_files(path: str) -> str:
    """Return a hash of names, sizes and dates of a model's files.

    A run is not continued with other weights under the same name.
    """
    root = Path(path)
    folder = root if (root / "config.json").is_file() else find_checkpoint(path)
    found = sorted((folder or root).glob("*"))
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
