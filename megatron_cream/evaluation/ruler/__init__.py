# SPDX-License-Identifier: Apache-2.0
"""RULER's thirteen tasks (Hsieh et al., 2404.06654), case for case those of NVIDIA/RULER.

With the same tokenizer, length and seed the cases are the same texts as those that its scripts
write, and their scores are the same figures. A model continues ``prompt + prefix`` greedily by at
most ``new_tokens(task)`` tokens; what it wrote goes to ``score``:

    materials = Materials(essay=read_haystack("PaulGrahamEssays.json"))
    tokens = lambda text: len(tokenizer.encode([text])[0])
    cases = make_cases("niah_single_2", 4096, 20, tokens, materials)
    written = [write(case.prompt + case.prefix, new_tokens("niah_single_2")) for case in cases]
    print(score("niah_single_2", written, [case.answers for case in cases]))

niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe and fwe need no file; the other niah tasks
need an essay, qa_1 questions in SQuAD's form, qa_2 in HotpotQA's (``read_questions``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.cases import (
    NeedleKind,
    make_common_words,
    make_frequent_words,
    make_needles,
    make_questions,
    make_variables,
)
from megatron_cream.evaluation.ruler.materials import (
    Materials,
    read_haystack,
    read_questions,
    read_words,
)
from megatron_cream.evaluation.ruler.sampler import (
    COMMON,
    FREQUENT,
    MODEL_TEMPLATES,
    NIAH,
    QUESTIONS,
    VARIABLES,
    CaseSampler,
    RulerCase,
    TaskWording,
)

__all__ = ["MODEL_TEMPLATES", "Materials", "read_haystack", "read_questions", "read_words"]

NEEDLES = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind("essay"),
    "niah_single_3": NeedleKind("essay", value="uuids"),
    "niah_multikey_1": NeedleKind("essay", keys=4),
    "niah_multikey_2": NeedleKind("needle"),
    "niah_multikey_3": NeedleKind("needle", key="uuids", value="uuids"),
    "niah_multivalue": NeedleKind("essay", values=4),
    "niah_multiquery": NeedleKind("essay", queries=4),
}


@dataclass(frozen=True)
class RulerTask:
    """One of the thirteen tasks.

    Attributes:
        make: sampler, name, materials and number of cases to the cases.
        wording: its sentences.
        needs: the field of ``Materials`` that has to be given, or an empty string.
    """

    make: Callable[[CaseSampler, str, Materials, int], list[RulerCase]]
    wording: TaskWording
    needs: str = ""


_TASKS = {
    **{
        name: RulerTask(
            partial(make_needles, kind=kind), NIAH, "essay" if kind.haystack == "essay" else ""
        )
        for name, kind in NEEDLES.items()
    },
    "vt": RulerTask(make_variables, VARIABLES),
    "cwe": RulerTask(make_common_words, COMMON),
    "fwe": RulerTask(make_frequent_words, FREQUENT),
    "qa_1": RulerTask(partial(make_questions, form="squad"), QUESTIONS, "squad"),
    "qa_2": RulerTask(partial(make_questions, form="hotpot"), QUESTIONS, "hotpot"),
}
TASKS = tuple(_TASKS)
"""RULER's names, in its order."""

_FILES = {
    "essay": "--haystack FILE",
    "squad": "--qa FILE in SQuAD's form",
    "hotpot": "--qa FILE in HotpotQA's form",
}


def new_tokens(task: str) -> int:
    """Return how many tokens a model may write in answer."""
    return _TASKS[task].wording.new_tokens


def available(materials: Materials) -> list[str]:
    """Return the tasks whose material is there."""
    return [
        name for name, task in _TASKS.items() if not task.needs or getattr(materials, task.needs)
    ]


def validate_material(task: str, materials: Materials) -> None:
    """Refuse a task that there is no material for.

    Raises:
        UserError: naming the flag, or the tasks that there are.
    """
    if task not in TASKS:
        raise UserError(f"the task is {task!r}: it must be one of {', '.join(TASKS)}")
    if task not in available(materials):
        raise UserError(f"{task} needs {_FILES[_TASKS[task].needs]}")


def make_cases(
    task: str,
    length: int,
    cases: int,
    count: Callable[[str], int],
    materials: Materials | None = None,
    model_template: str = MODEL_TEMPLATES["base"],
    seed: int = 42,
) -> list[RulerCase]:
    """Return the cases of a task, always the same for the same arguments.

    Args:
        task: one of ``TASKS``.
        length: tokens of a case, those that the model may write included.
        cases: how many; fewer cases are the first ones of more.
        count: text to its number of tokens, without those that begin or end a text.
        materials: words are always there.
        model_template: what stands around a case; of ``MODEL_TEMPLATES``, or a text with
            ``{task_template}``.
        seed: RULER's is 42.

    Raises:
        UserError: no such task, no material for it, or a length too short for it.
    """
    materials = materials or Materials()
    validate_material(task, materials)
    if "{task_template}" not in model_template:
        raise UserError("the model's template has no {task_template}: the task stands there")
    sampler = CaseSampler(length, count, model_template, seed)
    return _TASKS[task].make(sampler, task, materials, cases)


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


def metric(task: str) -> str:
    """Return the name of a task's score."""
    return "string_match_part" if task.startswith("qa_") else "string_match_all"


def score_case(task: str, written: str, answers: Sequence[str]) -> float:
    """Return the score of one case, from 0 to 1."""
    match = string_match_part if metric(task) == "string_match_part" else string_match_all
    return match(clean(written), answers)


def mean_score(scores: Sequence[float]) -> float:
    """Return the score of a task, from 0 to 100, with two digits as RULER rounds it."""
    return round(sum(scores) / len(scores) * 100, 2)


def score(task: str, written: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return the score of a task's cases; see ``mean_score``."""
    pairs = zip(written, answers, strict=True)
    return mean_score([score_case(task, text, of_case) for text, of_case in pairs])


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
