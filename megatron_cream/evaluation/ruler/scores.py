# SPDX-License-Identifier: Apache-2.0
"""What a model wrote against the answers, and RULER's figures over tasks and lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

THRESHOLD = 85.6
"""Llama-2-7B's average at 4K, which RULER asks of a length that is used effectively."""


def clean(written: str) -> str:
    """Return what a model wrote, control characters as line breaks, without space around."""
    return re.sub(r"[\x00-\x1f]", "\n", written.strip()).strip()


def string_match_all(written: str, answers: Sequence[str]) -> float:
    """Return which share of the answers (0 to 1) stands in the text, in upper or lower case."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def string_match_part(written: str, answers: Sequence[str]) -> float:
    """Return 1 if any of the answers stands in the text, in upper or lower case, otherwise 0."""
    return float(any(answer.lower() in written.lower() for answer in answers))


def score(task: str, written: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return the score of a task's cases, from 0 to 100, with two digits as RULER rounds it."""
    match = string_match_part if task.startswith("qa_") else string_match_all
    each = [match(clean(text), of_case) for text, of_case in zip(written, answers, strict=True)]
    return round(sum(each) / len(each) * 100, 2)


def average(scores: Mapping[str, float]) -> float:
    """Return the mean over the tasks at one length; thirteen make it RULER's average."""
    return sum(scores.values()) / len(scores)


def weighted_averages(averages: Mapping[int, float]) -> tuple[float, float]:
    """Return RULER's weighted averages over lengths: weights that increase, and that decrease.

    Args:
        averages: of each length in tokens. The weights are 1, 2, 3, ... by rank of length.
    """
    by_length = [averages[length] for length in sorted(averages)]
    count = len(by_length)
    total = count * (count + 1) / 2
    increasing = sum((i + 1) * value for i, value in enumerate(by_length)) / total
    decreasing = sum((count - i) * value for i, value in enumerate(by_length)) / total
    return increasing, decreasing


def effective_length(averages: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """Return the longest length whose average is at least the threshold, None if there is none."""
    return max((n for n, value in averages.items() if value >= threshold), default=None)
