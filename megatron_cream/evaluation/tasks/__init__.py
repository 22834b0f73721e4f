# SPDX-License-Identifier: Apache-2.0
"""Tasks by name. Each is a function of (length, seed, number of cases) and a kit.

passkey            five digits in a repeated phrase (Mohtashami and Jaggi, 2305.16300)
needle             one sentence in prose, asked for word by word
longchat-lines     the number of one of many lines (LongChat)
kv-retrieval       the value of one of many keys (Lost in the Middle, 2307.03172)
niah-multikey      the number of one of several keys in prose (RULER, 2404.06654)
variable-tracking  the variables that a value reaches (RULER)
common-words       the ten words that stand in a list most often (RULER)
frequent-words     the three most frequent invented words (RULER)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_cream.evaluation.haystacks import Draft, Haystack, Kit
from megatron_cream.evaluation.tasks import lines, needles, words

Maker = Callable[[Kit, int, int, int], list[Haystack]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        make: kit, length, seed and number of cases to haystacks; a pure function.
        shot: seed to a worked example of a few pieces.
        number: whether the published score is of the first integer of the answer.
        placed: whether the answer stands at a place in the context.
        harder_from: lengths from which on a case has more in it that must fit.
    """

    make: Maker
    shot: Callable[[int], Draft]
    number: bool = False
    placed: bool = True
    harder_from: tuple[int, ...] = ()


TASKS: dict[str, Task] = {
    "passkey": Task(needles.passkey, needles.passkey_shot, number=True),
    "needle": Task(needles.needle, needles.needle_shot),
    "longchat-lines": Task(lines.longchat, lines.longchat_shot, number=True),
    "kv-retrieval": Task(lines.kv, lines.kv_shot),
    "niah-multikey": Task(needles.multikey, needles.multikey_shot, number=True),
    "variable-tracking": Task(needles.variables, needles.variables_shot),
    "common-words": Task(words.common, words.common_shot, placed=False, harder_from=(words.LONG,)),
    "frequent-words": Task(words.frequent, words.frequent_shot, placed=False),
}

__all__ = ["TASKS", "Task"]
