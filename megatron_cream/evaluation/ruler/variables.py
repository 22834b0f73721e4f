# SPDX-License-Identifier: Apache-2.0
"""Variable tracking: one chain of four hops in noise, behind a worked example."""

from __future__ import annotations

import string

from megatron_cream.evaluation.ruler.fitting import Case, Draw, Job, drawn, largest, split
from megatron_cream.evaluation.ruler.templates import NOISE, VARIABLES, around, fill

HOPS = 4
EXAMPLE_LENGTH = 500
"""Tokens of the worked example, at most."""
_EXAMPLE_VALUE = "12345"
_EXAMPLE_STEP = 5


def make(job: Job, task: str, cases: int) -> list[Case]:
    """Return the cases."""
    example = _example(job)
    step = 10 if job.length >= 4096 else 5
    more = job.count(example) + VARIABLES.new_tokens
    size = largest(job, lambda size: _draw(job, size), step, more)
    made = []
    for _ in range(cases):
        draw, length = drawn(
            job,
            task,
            lambda size: _with_example(job, _draw(job, size), example),
            size,
            step,
            VARIABLES.new_tokens,
        )
        made.append(split(draw, VARIABLES.prefix, length))
    return made


def _example(job: Job) -> str:
    """Return the worked example, with its answer; names and value are drawn anew for each case."""
    short = Job(EXAMPLE_LENGTH, job.count, seed=job.seed)
    short.random, short.numpy = job.random, job.numpy  # one random state for all

    def draw(size: int) -> Draw:
        return _draw(short, size, example=True)

    size = largest(short, draw, _EXAMPLE_STEP, 0)
    made, _ = drawn(short, "vt's worked example", draw, size, _EXAMPLE_STEP, 0)
    return made.text + " " + " ".join(made.answers) + "\n"


def _draw(job: Job, size: int, example: bool = False) -> Draw:
    names = _names(job, 3 if example else 5)
    value = _EXAMPLE_VALUE if example else str(job.numpy.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS)]
    lines = [NOISE] * size
    places = sorted(job.random.sample(range(size), len(chain)))
    for i, (place, link) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + i, link)
    context = "\n".join(lines).replace(". \n", ".\n")
    text = fill(around(VARIABLES, job.model_template), context=context, query=value, num_v=HOPS + 1)
    return Draw(text, names)


def _names(job: Job, letters: int) -> list[str]:
    names = [_letters(job, letters) for _ in range(HOPS + 1)]
    while len(set(names)) < HOPS + 1:
        names.append(_letters(job, letters))
    return names[: HOPS + 1]


def _letters(job: Job, count: int) -> str:
    return "".join(job.random.choices(string.ascii_uppercase, k=count))


def _with_example(job: Job, draw: Draw, example: str) -> Draw:
    for name in example.split()[-HOPS - 1 :]:
        example = example.replace(name, _letters(job, len(name)))
    example = example.replace(_EXAMPLE_VALUE, str(job.numpy.randint(10000, 99999)))
    at = draw.text.index(VARIABLES.template[:20])  # behind what the model's template begins with
    return Draw(draw.text[:at] + example + "\n" + draw.text[at:], draw.answers)
