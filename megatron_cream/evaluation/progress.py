# SPDX-License-Identifier: Apache-2.0
"""What runs of cases and of documents share: settings, progress, the files at the end."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cream.evaluation.forward import Model
from megatron_cream.evaluation.models import fingerprint
from megatron_cream.evaluation.store import Store
from megatron_cream.evaluation.tables import table
from megatron_cream.positions.plots import has_matplotlib


def settings(args: Namespace, model: Model, task: str) -> dict[str, Any]:
    """Return what decides the results of a task, besides the task's own options.

    Not the lengths: a run may be continued with more of them.
    """
    return {
        "task": task,
        "name": args.name or Path(model.name).name,
        "model": model.name,
        "window": model.window,
        "weights": fingerprint(model.name),
        **model.settings,
    }


def weighed(tokens: int, length: int) -> int:
    """Tokens as the time they take: attention makes long ones dearer."""
    return int(tokens * (1 + length / 8192))


def progress_bar(title: str, total: int, shown: bool) -> tqdm:
    """Return a bar with the time left, over ``total`` of ``weighed`` tokens."""
    return tqdm(
        total=total,
        desc=title,
        disable=not shown,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
    )


def finish(store: Store, result: dict[str, Any]) -> None:
    """Write results, table and, where matplotlib is, picture, if there is a folder."""
    store.finish(result, table(result))
    if store.primary and has_matplotlib():
        from megatron_cream.evaluation.pictures import draw

        draw([result], store.folder / "picture.png")


def say_without_picture() -> None:
    """Say in one line that there is no picture, where matplotlib is not installed."""
    if not has_matplotlib():
        print(
            "note: no picture.png, a picture needs matplotlib: pip install matplotlib, and start "
            "the same command again",
            file=sys.stderr,
        )
