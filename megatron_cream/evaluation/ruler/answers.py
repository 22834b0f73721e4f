# SPDX-License-Identifier: Apache-2.0
"""Makes RULER's cases, has a model answer them greedily as RULER does, and scores what it writes.

Cases are made in several processes, while the model is loaded and answers others: nearly all of
the time goes into counting tokens. A task at a length has a random state of its own, so that the
cases are the same in whatever process, and in whatever order, they are made. Nothing here imports
torch at once, which those processes do without.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.ruler.materials import QuestionSet
from megatron_cream.evaluation.ruler.sampler import RulerCase

if TYPE_CHECKING:
    from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
    from megatron_cream.evaluation.forward import ScoringModel
    from megatron_cream.evaluation.prompts import Prompt
    from megatron_cream.evaluation.store import ResultStore

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


def score_ruler(
    settings: EvaluationSettings, model: ScoringModel, prompt: Prompt, cases: RulerCases
) -> dict[str, Any]:
    """Have every case answered and return the results; write them if there is a folder.

    A run that was killed is continued: cases that the folder has are not answered again, and it has
    the results of all lengths that were finished.
    """
    from megatron_cream.evaluation.result_files import RULER_RECORDS
    from megatron_cream.evaluation.store import open_store

    tasks = cases.tasks
    decisive = _ruler_settings(settings, prompt, tasks)
    with open_store(settings, model, "ruler", decisive, RULER_RECORDS) as store:
        known = {(*key, index) for key in cases for index in range(cases.samples)}
        store.validate_finished(set(settings.lengths), known)
        for length in _answer_cases(model, prompt, cases, store):
            found = ruler_results(store.finished, tasks, cases.samples, settings.threshold)
            result = store.finish(found, draw=length == settings.lengths[-1])
    return result


def _ruler_settings(
    settings: EvaluationSettings, prompt: Prompt, tasks: list[str]
) -> dict[str, Any]:
    """Return what decides the cases of a run; a file by its content as well."""
    files = {
        "haystack": settings.haystack,
        "qa": settings.qa and list(settings.qa),
        "words": settings.words,
    }
    return {
        "tokenizer": prompt.tokenizer.name,
        "prompt": settings.prompt,
        "bos": prompt.bos,
        "samples": settings.samples,
        "ruler_tasks": tasks,
        **files,
        **{
            f"{name}_content": given and _content([given] if isinstance(given, str) else given)
            for name, given in files.items()
        },
    }


def _content(paths: Iterable[str]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return found.hexdigest()[:16]


def _answer_cases(
    model: ScoringModel, prompt: Prompt, cases: RulerCases, store: ResultStore
) -> Iterator[int]:
    """Have the cases of all tasks answered that are not yet; yield each length when it is done."""
    from megatron_cream.evaluation.forward import progress_bar, weigh_tokens

    done = store.done
    eod = prompt.tokenizer.eod
    stop = model.stop_tokens or (() if eod is None else (eod,))
    lengths = list(dict.fromkeys(length for length, _ in cases))
    # Those that write most first: a batch writes for as long as one of its cases does.
    tasks = sorted(cases.tasks, key=ruler.new_tokens, reverse=True)
    total = sum(weigh_tokens(n, n) for n in lengths) * len(tasks) * cases.samples
    with progress_bar("ruler", total, model.primary) as bar:
        for length in lengths:
            began = time.monotonic()
            model.set_length(length)
            own = [
                (task, index, one)
                for task in tasks
                for index, one in enumerate(cases[length, task])
            ]
            left = [one for one in own if (length, *one[:2]) not in done]
            waited = time.monotonic() - began
            bar.update(weigh_tokens(length, length) * (len(own) - len(left)))
            new_tokens = [ruler.new_tokens(task) for task, *_ in left]
            answers = model.generate([one.tokens for *_, one in left], new_tokens, stop)
            for (task, index, one), tokens in zip(left, answers, strict=True):
                store.add([_record(prompt.tokenizer, length, task, index, one.case, tokens)])
                bar.update(weigh_tokens(length, length))
            for task in tasks:
                cases.forget((length, task))
            if left and model.primary:
                seconds = time.monotonic() - began
                bar.write(
                    f"{length} tokens: {len(left)} cases in {seconds:.1f} s, {waited:.1f} of "
                    "them until the cases were made",
                    file=sys.stderr,
                )
            yield length


def _record(
    tokenizer: Tokenizer, length: int, task: str, index: int, case: RulerCase, tokens: np.ndarray
) -> dict[str, Any]:
    # Rows of the output layer that only pad the vocabulary are no token of a text.
    written = tokenizer.decode(tokens[tokens < tokenizer.vocab_size])
    return {
        "length": length,
        "task": task,
        "index": index,
        "score": ruler.score_case(task, written, case.answers),
        "written": written,
        "answers": list(case.answers),
        "written_tokens": len(tokens),
        "case_tokens": case.length,
    }


def ruler_results(
    records: list[dict[str, Any]], tasks: list[str], samples: int, threshold: float
) -> dict[str, Any]:
    """Return scores by length and task, 0 to 100, and what RULER makes of them.

    A length counts where all of its cases are answered.
    """
    by_length: dict[int, dict[str, list[float]]] = {}
    for one in records:
        by_length.setdefault(one["length"], {}).setdefault(one["task"], []).append(one["score"])
    rows: list[dict[str, Any]] = []
    for length, found in sorted(by_length.items()):
        if {task: len(each) for task, each in found.items()} == dict.fromkeys(tasks, samples):
            scores = {task: ruler.mean_score(found[task]) for task in tasks}
            row = {"length": length, "cases": samples, "average": ruler.average(scores)}
            by_metric = {task: {ruler.metric(task): value} for task, value in scores.items()}
            rows.append({**row, "scores": by_metric})
    averages = {row["length"]: row["average"] for row in rows}
    increasing, decreasing = ruler.weighted_averages(averages)
    return {
        "lengths": rows,
        "weighted_average_increasing": increasing,
        "weighted_average_decreasing": decreasing,
        "threshold": threshold,
        "effective_length": ruler.effective_length(averages, threshold),
    }
