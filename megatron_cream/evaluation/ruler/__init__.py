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

from collections.abc import Callable

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler import counting, needles, questions, variables
from megatron_cream.evaluation.ruler.fitting import Case, Job
from megatron_cream.evaluation.ruler.materials import (
    Materials,
    Questions,
    read_haystack,
    read_questions,
    read_words,
)
from megatron_cream.evaluation.ruler.needles import Needles
from megatron_cream.evaluation.ruler.scores import (
    THRESHOLD,
    average,
    effective_length,
    score,
    string_match_all,
    string_match_part,
    weighted_averages,
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
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", queries=4),
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


def _missing(task: str, materials: Materials) -> str | None:
    """Return which flag's file a task lacks."""
    if task in NEEDLES and NEEDLES[task].haystack == "essay" and not materials.essay:
        return "--haystack FILE"
    if task in ("qa_1", "qa_2") and _questions(task, materials) is None:
        return f"--qa FILE in {'SQuAD' if task == 'qa_1' else 'HotpotQA'}'s form"
    return None


def _questions(task: str, materials: Materials) -> Questions | None:
    return materials.squad if task == "qa_1" else materials.hotpot


def make_cases(
    task: str,
    length: int,
    cases: int,
    count: Callable[[str], int],
    materials: Materials | None = None,
    model_template: str = MODEL_TEMPLATES["base"],
    seed: int = 42,
) -> list[Case]:
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
    if task not in TASKS:
        raise UserError(f"the task is {task!r}: it must be one of {', '.join(TASKS)}")
    if "{task_template}" not in model_template:
        raise UserError("the model's template has no {task_template}: the task stands there")
    materials = materials or Materials()
    if (missing := _missing(task, materials)) is not None:
        raise UserError(f"{task} needs {missing}")
    job = Job(length, count, model_template, seed)
    if task in NEEDLES:
        return needles.make(job, task, NEEDLES[task], materials, cases)
    if task == "vt":
        return variables.make(job, task, cases)
    if task == "cwe":
        return counting.make_common(job, task, materials, cases)
    if task == "fwe":
        return counting.make_frequent(job, task, cases)
    return questions.make(job, task, _questions(task, materials), cases)


__all__ = [
    "MODEL_TEMPLATES",
    "TASKS",
    "THRESHOLD",
    "Case",
    "Materials",
    "Questions",
    "available",
    "average",
    "effective_length",
    "make_cases",
    "new_tokens",
    "read_haystack",
    "read_questions",
    "read_words",
    "score",
    "string_match_all",
    "string_match_part",
    "weighted_averages",
]
