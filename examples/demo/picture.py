# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: perplexity by context length, as tools/evaluate.py compare draws it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cream.evaluation import pictures


def draw(results: Sequence[dict[str, Any]], train_length: int, path: Path) -> None:
    """Draw one line a model, and the window that all were trained at."""
    trained = [{**result, "window": train_length} for result in results]
    pictures.draw(trained, path, window="trained window {}")
