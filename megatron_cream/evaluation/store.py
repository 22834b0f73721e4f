# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its settings, every finished case at once, and the results at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError

SETTINGS, CASES, RESULT = "settings.json", "cases.jsonl", "result.json"


class Store:
    """A run's folder, made or continued.

    Args:
        folder: OUTPUT; None keeps nothing.
        settings: what decides the results; a run is continued with the same ones only.
        primary: whether this process writes; the others read.

    Raises:
        UserError: the folder has a run of other settings, or something else.
    """

    def __init__(
        self, folder: str | Path | None, settings: dict[str, Any], primary: bool = True
    ) -> None:
        self.primary = primary and folder is not None
        self.settings = json.loads(json.dumps(settings))  # as they are read again
        self.finished: list[dict[str, Any]] = []
        if folder is not None:
            self.folder = Path(folder)
            self._open()
            self.finished = self._read()

    def _open(self) -> None:
        path = self.folder / SETTINGS
        if path.is_file():
            _compare(json.loads(path.read_text("utf-8")), self.settings, self.folder)
        elif self.folder.exists() and (self.folder.is_file() or any(self.folder.iterdir())):
            raise UserError(
                f"--output is {self.folder}: it must be a new folder, or that of a run to continue"
            )
        elif self.primary:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, self.settings)

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / CASES
        if not path.is_file():
            return []
        # A killed run may have left half a line, which is done again.
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if self.primary and len(whole) < len(text):
            path.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write finished records down, now."""
        self.finished += records
        if self.primary:
            with open(self.folder / CASES, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))

    def finish(self, result: dict[str, Any], table: str) -> None:
        """Write the results."""
        if self.primary:
            _write(self.folder / RESULT, result)
            (self.folder / "table.md").write_text(table + "\n", "utf-8")


def read_result(folder: str | Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(folder) / RESULT
    if not path.is_file():
        raise FileNotFoundError(f"RUN is {folder}: it must be the --output of a finished run")
    return json.loads(path.read_text("utf-8"))


def _compare(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        differences = ", ".join(f"{key} {before.get(key)} != {now.get(key)}" for key in keys)
        raise UserError(
            f"--output is {folder}: it has a run of other settings ({differences}); take another "
            "folder, or the same settings to continue it"
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
