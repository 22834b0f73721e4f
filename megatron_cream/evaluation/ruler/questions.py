# SPDX-License-Identifier: Apache-2.0
"""Questions about documents, of SQuAD or HotpotQA, among other documents of the same file."""

from __future__ import annotations

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.fitting import Case, Draw, Job, drawn, largest, split
from megatron_cream.evaluation.ruler.materials import Asked, Questions
from megatron_cream.evaluation.ruler.templates import DOCUMENT, QUESTIONS, around, fill

_STEP = 10


def make(job: Job, task: str, questions: Questions, cases: int) -> list[Case]:
    """Return the cases; case i asks the i-th question of the file.

    Raises:
        UserError: the file has fewer questions.
    """
    if cases > len(questions.asked):
        raise UserError(f"{cases} cases of {task}: --qa has {len(questions.asked)} questions")
    first = questions.asked[0]
    template = around(QUESTIONS, job.model_template)

    def draw(asked: Asked, size: int) -> Draw | None:
        documents = _documents(job, questions.documents, asked, size)
        if documents is None:
            return None
        context = "\n\n".join(
            fill(DOCUMENT, i=i + 1, document=text) for i, text in enumerate(documents)
        )
        return Draw(fill(template, context=context, query=asked.question), asked.answers)

    def draw_first(size: int) -> Draw:
        made = draw(first, size)
        if made is None:
            raise UserError(f"{task}: the first question of --qa has more than {size} documents")
        return made

    size = largest(job, draw_first, _STEP, QUESTIONS.new_tokens)
    made = []
    for asked in questions.asked[:cases]:
        case, length = drawn(
            job,
            task,
            lambda size, asked=asked: draw(asked, size),
            size,
            _STEP,
            QUESTIONS.new_tokens,
        )
        made.append(split(case, QUESTIONS.prefix, length))
    return made


def _documents(job: Job, documents: list[str], asked: Asked, size: int) -> list[str] | None:
    """Return ``size`` documents, those of the question among them; None where it has more."""
    if size >= len(documents):
        chosen = (documents * -(-size // len(documents)))[:size]
    else:
        missing = size - len(asked.own)
        if missing < 0:
            return None
        if missing > len(asked.near):
            known = {*asked.own, *asked.near}
            others = [i for i in range(len(documents)) if i not in known]
            numbers = asked.own + asked.near
            numbers = numbers + job.random.sample(others, max(0, size - len(numbers)))
        else:
            numbers = asked.own + job.random.sample(asked.near, missing)
        chosen = [documents[i] for i in numbers]
    job.shuffle(chosen)
    return chosen
