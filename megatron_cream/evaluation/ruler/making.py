# SPDX-License-Identifier: Apache-2.0
"""Makes the cases of a run in several processes, while the model is loaded and answers others.

Nearly all of the time goes into counting tokens. A task at a length has a random state of its own,
so that the cases are the same in whatever process, and in whatever order, they are made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.ruler.materials import QuestionSet
from megatron_cream.evaluation.ruler.sampler import RulerCase

if TYPE_CHECKING:
    from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
    from megatron_cream.evaluation.prompts import Prompt

_TOKENS_PER_WORD = 9  # of cwe: three times a number, a full stop and the word
_FEW_TOKENS = 2**20  # cases of fewer together are made before other processes have begun


@dataclass(frozen=True)
class EncodedCase:
    """A case, and what a model reads of it: int64 ``[n]``, begun as its texts begin."""

    case: RulerCase
    tokens: np.ndarray


@dataclass(frozen=True)
class CaseMaker:
    """Everything that decides the cases of a run."""

    tokenizer: Tokenizer
    bos: bool
    materials: ruler.Materials
    template: str
    samples: int

    def make(self, length: int, task: str) -> list[EncodedCase]:
        """Return the cases of a task at a length."""
        made = ruler.make_cases(
            task, length, self.samples, self._count, self.materials, self.template
        )
        return [EncodedCase(case, self._read(case)) for case in made]

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode([text])[0])

    def _read(self, case: RulerCase) -> np.ndarray:
        """Return the tokens of one text, behind the token that begins a text."""
        tokens = self.tokenizer.encode([case.prompt + case.prefix])[0].astype(np.int64)
        if self.bos and tokens[0] != self.tokenizer.bos:
            tokens = np.concatenate([[self.tokenizer.bos], tokens])
        return tokens


class RulerCases(Mapping[tuple[int, str], list[EncodedCase]]):
    """Length and task to their cases, by length and then in RULER's order of tasks.

    Reading cases that are not made yet waits for them. ``close`` ends what still makes cases.
    """

    def __init__(self, keys: list[tuple[int, str]], samples: int) -> None:
        self._made: dict[tuple[int, str], Any] = dict.fromkeys(keys)
        self.samples = samples
        self._pool: ProcessPoolExecutor | None = None

    def make_here(self, maker: CaseMaker) -> None:
        """Make all cases now, in this process."""
        for length, task in self._made:
            self._made[length, task] = maker.make(length, task)

    def make_beside(self, processes: int, first: list[tuple[int, str]], given: tuple) -> None:
        """Begin to make cases in processes, those of ``first`` first, and wait for these."""
        # A fresh interpreter each: a copy of this one would have its threads' locks.
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _start, given)
        for key in [*first, *(key for key in self._made if key not in first)]:
            self._made[key] = self._pool.submit(_make, *key)
        for key in first:
            self[key]

    def __getitem__(self, key: tuple[int, str]) -> list[EncodedCase]:
        made = self._made[key]
        if isinstance(made, Future):
            try:
                made = made.result()
            except BaseException:
                self.close()
                raise
        return made

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in RULER's order."""
        return list(dict.fromkeys(task for _, task in self))

    def forget(self, key: tuple[int, str]) -> None:
        """Let go of cases that are answered, whose texts are long."""
        self._made[key] = []

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


_maker: CaseMaker | None = None


def _start(name: str, folder: str | None, settings: EvaluationSettings, *rest: Any) -> None:
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker = CaseMaker(load_tokenizer(name, folder), rest[0], read_materials(settings), *rest[1:])


def _make(length: int, task: str) -> list[EncodedCase]:
    assert _maker is not None
    return _maker.make(length, task)


def open_cases(settings: EvaluationSettings, prompt: Prompt) -> RulerCases:
    """Return the cases of a run, of which some may still be made.

    Those that can be impossible are made before it returns: of the shortest length, and of the
    longest ``cwe``, which runs out of words.

    Raises:
        UserError, OSError: a file that a task needs is missing or of another form, or a length is
            too short for a task.
    """
    materials = read_materials(settings)
    tasks = _tasks(settings, materials)
    template = ruler.MODEL_TEMPLATES.get(settings.prompt, prompt.model_template)
    keys = [(length, task) for length in settings.lengths for task in tasks]
    cases = RulerCases(keys, settings.samples)
    # A size is searched for by about as many cases more.
    tokens = sum(settings.lengths) * len(tasks) * (settings.samples + 20)
    processes = min(_processes(), len(keys))
    if tokens < _FEW_TOKENS or processes == 1:
        cases.make_here(
            CaseMaker(prompt.tokenizer, prompt.bos, materials, template, settings.samples)
        )
        return cases
    first = [key for key in keys if key[0] == settings.lengths[0]]
    longest = settings.lengths[-1]
    if "cwe" in tasks and longest > _TOKENS_PER_WORD * len(materials.words):
        first.insert(0, (longest, "cwe"))
    name, folder = prompt.tokenizer.name, prompt.folder
    given = (name, folder, settings, prompt.bos, template, settings.samples)
    cases.make_beside(processes, first, given)
    return cases


def _processes() -> int:
    """Return the CPUs that this rank may use."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def read_materials(settings: EvaluationSettings) -> ruler.Materials:
    """Read the files of --haystack, --qa and --words.

    Raises:
        UserError, OSError: a file of another form, or two of --qa in the same.
    """
    questions: dict[str, QuestionSet] = {}
    for path in settings.qa or ():
        kind, found = ruler.read_questions(path)
        if kind in questions:
            form = {"squad": "SQuAD", "hotpot": "HotpotQA"}[kind]
            raise UserError(f"--qa has {path}: there must be one file in {form}'s form, not two")
        questions[kind] = found
    return ruler.Materials(
        ruler.read_haystack(settings.haystack) if settings.haystack is not None else [],
        questions.get("squad"),
        questions.get("hotpot"),
        ruler.read_words(settings.words) if settings.words is not None else [],
    )


def _tasks(settings: EvaluationSettings, materials: ruler.Materials) -> list[str]:
    """Return the tasks that are asked for, by default those with all files, in RULER's order.

    Raises:
        UserError: no such task, or one whose file is not given.
    """
    if settings.ruler_tasks is None:
        return ruler.available(materials)
    for task in settings.ruler_tasks:
        ruler.validate_material(task, materials)
    return [task for task in ruler.TASKS if task in settings.ruler_tasks]
