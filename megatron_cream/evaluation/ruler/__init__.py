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

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.cases import (
    NeedleKind,
    make_common_words,
    make_frequent_words,
    make_needles,
    make_questions,
    make_variables,
)
from megatron_cream.evaluation.ruler.fitting import CaseSampler, RulerCase
from megatron_cream.evaluation.ruler.materials import (
    Materials,
    QuestionSet,
    read_haystack,
    read_questions,
    read_words,
)
from megatron_cream.evaluation.ruler.templates import (
    COMMON,
    FREQUENT,
    MODEL_TEMPLATES,
    NIAH,
    QUESTIONS,
    VARIABLES,
)

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
_OTHERS = {
    "vt": VARIABLES,
    "cwe": COMMON,
    "fwe": FREQUENT,
    "qa_1": QUESTIONS,
    "qa_2": QUESTIONS,
}
TASKS = (*NEEDLES, *_OTHERS)
"""RULER's names, in its order."""


def new_tokens(task: str) -> int:
    """Return how many tokens a model may write in answer."""
    return _OTHERS.get(task, NIAH).new_tokens


def available(materials: Materials) -> list[str]:
    """Return the tasks whose material is there."""
    return [task for task in TASKS if _missing(task, materials) is None]


def validate_material(task: str, materials: Materials) -> None:
    """Refuse a task that there is no material for.

    Raises:
        UserError: naming the flag, or the tasks that there are.
    """
    if task not in TASKS:
        raise UserError(f"the task is {task!r}: it must be one of {', '.join(TASKS)}")
    if (missing := _missing(task, materials)) is not None:
        raise UserError(f"{task} needs {missing}")


def _missing(task: str, materials: Materials) -> str | None:
    """Return which flag's file a task lacks."""
    if task in NEEDLES and NEEDLES[task].haystack == "essay" and not materials.essay:
        return "--haystack FILE"
    if task in ("qa_1", "qa_2") and _questions(task, materials) is None:
        return f"--qa FILE in {'SQuAD' if task == 'qa_1' else 'HotpotQA'}'s form"
    return None


def _questions(task: str, materials: Materials) -> QuestionSet | None:
    return materials.squad if task == "qa_1" else materials.hotpot


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
    if task in NEEDLES:
        return make_needles(sampler, task, NEEDLES[task], materials, cases)
    if task == "vt":
        return make_variables(sampler, task, cases)
    if task == "cwe":
        return make_common_words(sampler, task, materials, cases)
    if task == "fwe":
        return make_frequent_words(sampler, task, cases)
    questions = _questions(task, materials)
    assert questions is not None  # as ``_missing`` found
    return make_questions(sampler, task, questions, cases)


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


__all__ = [
    "MODEL_TEMPLATES",
    "TASKS",
    "THRESHOLD",
    "Materials",
    "QuestionSet",
    "RulerCase",
    "available",
    "average",
    "effective_length",
    "make_cases",
    "mean_score",
    "metric",
    "new_tokens",
    "read_haystack",
    "read_questions",
    "read_words",
    "score",
    "score_case",
    "string_match_all",
    "string_match_part",
    "validate_material",
    "weighted_averages",
]
