# SPDX-License-Identifier: Apache-2.0
"""Makes documents of exactly so many tokens, filler and then tasks, and a dataset of them.

Every document is a pure function of (seed, number). Its tasks are written as text and tokenized as
a whole, so that their tokens are those of any other text; filler in front is cut at a token.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream import ownership
from megatron_cream.corpus.executors import choose_start_method, use_one_thread
from megatron_cream.corpus.fast_encoder import GigatokenTokenizer, choose_engine
from megatron_cream.corpus.inspection import Counts, write_metadata
from megatron_cream.corpus.job import (
    APPEND_EOD,
    ENGINE,
    OUTPUT_PREFIX,
    OVERWRITE,
    TOKENIZER_MODEL,
    TOKENIZER_TYPE,
    WORKERS,
)
from megatron_cream.corpus.retrieval_tasks import MOST_QUESTIONS, Passage, RetrievalTask, draw_task
from megatron_cream.corpus.retrieval_words import Haystack, Rng, prose, read_haystack
from megatron_cream.corpus.storage import RETRIEVAL, WorkFolder, validate_absent, write_index
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.data.indexed import MASK_SUFFIX, token_dtype
from megatron_cream.errors import UserError
from megatron_cream.options import add_flags, flag_field, read_flags, validate_fields
from megatron_cream.positions import philox

SHORTEST = 256
"""Tokens of a document that any task fits in."""

_STREAM = 3  # keeps documents apart from positions and shuffling of the same seed
_LEAST = 200  # tokens of a task, where a document has several
_SIZES = (48, 64)  # from here on a task has all its questions, and grows by records alone
_ANCHOR = "\n"
_BLOCK = 16  # documents that a worker makes at a time

EXAMPLES = """
    megatron-cream retrieval-data --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer/ --length 8192 --documents 3000 --haystack books/train \\
        --workers 8 --output-prefix data/retrieval

Train on a blend: --data-path 0.85 data/train 0.15 data/retrieval. See docs/data.md.
"""


@dataclass(frozen=True)
class RetrievalConfig:
    """The settings of ``make_dataset``; each is a flag of ``megatron-cream retrieval-data``.

    Attributes:
        length: tokens of a document, end of document included: the trained window N.
        haystack: files and folders of text; none for sentences made here.
        questions: most questions of a task.
        tasks: most tasks of a document; with 1 each is as long as a document can have it.
        answers_only: write ``PREFIX.mask``, by which answers are trained and nothing else is.
    """

    tokenizer_type: str = flag_field(**TOKENIZER_TYPE)
    output_prefix: str = flag_field(**OUTPUT_PREFIX)
    length: int = flag_field("tokens of each: the trained window", type=int, metavar="N")
    documents: int = flag_field("how many", type=int, metavar="D")
    tokenizer_model: str | None = flag_field(**TOKENIZER_MODEL)
    seed: int = flag_field("what they are drawn from", default=1234, fewest=0, most=(1 << 64) - 1)
    haystack: tuple[str, ...] = flag_field(
        "text to hide facts in (default: sentences made here)",
        default=(),
        many=True,
        metavar="TEXT",
    )
    append_eod: bool = flag_field(**APPEND_EOD)
    prepend_bos: bool = flag_field("begin each document with the bos token", default=False)
    questions: int = flag_field("most questions of a task", default=MOST_QUESTIONS, metavar="Q")
    tasks: int = flag_field(
        "most tasks of a document; with 1 it is one list or text that fills it",
        default=4,
        most=4,
        metavar="K",
    )
    answers_only: bool = flag_field("have a loss on the answers alone: PREFIX.mask", default=False)
    engine: str = flag_field(**ENGINE)
    workers: int = flag_field(**WORKERS)
    overwrite: bool = flag_field(**OVERWRITE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream retrieval-data``."""
    add_flags(parser, RetrievalConfig)


def run(args: argparse.Namespace) -> None:
    """Make the dataset that the command line asks for, and say what was written."""
    config = read_flags(RetrievalConfig, args)
    made = make_dataset(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(
        f"written: {made['documents']} documents, {made['tokens']} tokens, {config.output_prefix}"
    )


def make_dataset(
    config: RetrievalConfig,
    *,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Write ``PREFIX.bin``, ``.idx``, ``.json`` and, for answers alone, ``.mask``.

    Returns:
        The content of ``PREFIX.json``.

    Raises:
        UserError: a setting that cannot work.
        OSError: a file that is missing or exists, or cannot be written.
    """
    validate_fields(config)
    ownership.validate_prefix(config.output_prefix)
    with WorkFolder(config.output_prefix, RETRIEVAL) as folder, use_one_thread():
        folder.finish_publishing()
        validate_absent(config.output_prefix, config.overwrite)
        maker = _maker(config)
        # Exact also on what is made here, or the reference.
        samples = [text for number in range(2) for text in maker.task_texts(number)]
        maker.tokenizer, reason = choose_engine(config.engine, maker.tokenizer, samples)
        say(reason)
        made = _write(config, maker, folder.staged, progress)
        folder.publish(config.overwrite)
        folder.remove()
    return made


def _maker(config: RetrievalConfig) -> DocumentMaker:
    tokenizer = load_tokenizer(
        config.tokenizer_type, config.tokenizer_model, config.append_eod, config.prepend_bos
    )
    haystack = read_haystack(list(config.haystack)) if config.haystack else None
    eod = tokenizer.eod if config.append_eod else None
    bos = tokenizer.bos if config.prepend_bos else None
    return DocumentMaker(
        tokenizer, config.length, config.seed, haystack, eod, config.questions, config.tasks, bos
    )


def _write(
    config: RetrievalConfig, maker: DocumentMaker, staged: str, progress: bool
) -> dict[str, Any]:
    dtype = token_dtype(maker.tokenizer.vocab_size)
    lengths = np.full(config.documents, config.length, dtype=np.int32)
    bar = tqdm(total=config.documents, unit="doc", disable=not progress)
    with ExitStack() as opened:
        names = (".bin", MASK_SUFFIX) if config.answers_only else (".bin",)
        files = [opened.enter_context(open(staged + name, "wb")) for name in names]
        opened.enter_context(bar)
        for arrays in _blocks(config, maker, dtype):
            for file, array in zip(files, arrays, strict=True):
                file.write(array.tobytes())
            bar.update(len(arrays[0]))
    ones = np.ones(config.documents, dtype=np.int64)
    write_index(staged + ".idx", dtype, [(lengths, ones)], config.documents, config.documents)
    return write_metadata(staged, _describe_settings(config, maker.tokenizer, dtype), Counts())


def _describe_settings(
    config: RetrievalConfig, tokenizer: Tokenizer, dtype: np.dtype
) -> dict[str, Any]:
    same = ("questions", "tasks", "answers_only", "tokenizer_type", "tokenizer_model")
    return {
        "kind": "retrieval",
        "seed": config.seed,
        "length": config.length,
        "haystack": list(config.haystack),
        **{name: getattr(config, name) for name in same},
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
        "bos_id": tokenizer.bos,
        "appended_eod": config.append_eod,
        "prepended_bos": config.prepend_bos,
        "min_tokens": 1,
        "max_tokens": None,
        "dtype": dtype.name,
    }


def _blocks(
    config: RetrievalConfig, maker: DocumentMaker, dtype: np.dtype
) -> Iterator[list[np.ndarray]]:
    """Yield tokens ``[documents of a block, length]``, and their mask if asked for, in order."""
    firsts, masked = range(0, config.documents, _BLOCK), config.answers_only
    ranges = [(first, min(first + _BLOCK, config.documents), dtype, masked) for first in firsts]
    if config.workers == 1:
        yield from (_make_block(maker, *one) for one in ranges)
        return
    context = get_context(choose_start_method())
    workers = min(config.workers, len(ranges))
    given = (config, isinstance(maker.tokenizer, GigatokenTokenizer))
    with ProcessPoolExecutor(workers, context, _start, given) as pool:
        yield from pool.map(_in_worker, ranges)


def _make_block(
    maker: DocumentMaker, first: int, end: int, dtype: np.dtype, masked: bool
) -> list[np.ndarray]:
    if not masked:
        return [np.stack([maker.make(number) for number in range(first, end)]).astype(dtype)]
    made = [maker.make_masked(number) for number in range(first, end)]
    return [np.stack([tokens for tokens, _ in made]).astype(dtype), np.stack([m for _, m in made])]


_workers_maker: DocumentMaker | None = None


def _start(config: RetrievalConfig, fast: bool) -> None:
    """In a worker, which may be a fresh interpreter: make its own maker."""
    global _workers_maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers_maker = _maker(config)
    if fast:
        _workers_maker.tokenizer = GigatokenTokenizer(_workers_maker.tokenizer)


def _in_worker(block: tuple[int, int, np.dtype, bool]) -> list[np.ndarray]:
    assert _workers_maker is not None
    return _make_block(_workers_maker, *block)


_FittedTask = tuple[list[Passage], np.ndarray]  # of a task at one size: its text and its tokens


def _text(passages: list[Passage]) -> str:
    return "".join(passage.text for passage in passages)


class DocumentMaker:
    """Makes documents of ``length`` tokens.

    Args:
        tokenizer: encodes them.
        length: tokens of each, the end of document and the beginning of text included.
        seed: what they are drawn from.
        haystack: text of the user's.
        eod, bos: tokens at the end and the beginning of each, None for none.
        questions: most questions of a task.
        tasks: most tasks of a document, 1 to 4.

    Raises:
        UserError: ``length`` is below ``SHORTEST``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        haystack: Haystack | None = None,
        eod: int | None = None,
        questions: int = MOST_QUESTIONS,
        tasks: int = 4,
        bos: int | None = None,
    ) -> None:
        if length < SHORTEST:
            raise UserError(f"--length is {length}: it must be at least {SHORTEST} tokens")
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.haystack, self.eod, self.questions, self.tasks = haystack, eod, questions, tasks
        self._anchor = tokenizer.encode([_ANCHOR])[0]
        self._head = [] if bos is None else [np.array([bos])]

    def make(self, number: int) -> np.ndarray:
        """Return the tokens int64 ``[length]`` of document ``number``."""
        rng, fitted = self._tasks(number)
        return self._joined(rng, [tokens for _, tokens in fitted])

    def make_masked(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of document ``number``, and uint8 ``[length]``: 1 for an answer's."""
        rng, fitted = self._tasks(number)
        tokens = self._joined(rng, [tokens for _, tokens in fitted])
        mask = np.concatenate([self._answers(*task) for task in fitted])
        end = self.length - (self.eod is not None)
        whole = np.zeros(self.length, dtype=np.uint8)
        whole[end - len(mask) : end] = mask
        return tokens, whole

    def task_texts(self, number: int) -> list[str]:
        """Return the text of each task of a document, without the filler in front of them."""
        return [_text(passages) for passages, _ in self._tasks(number)[1]]

    def _tasks(self, number: int) -> tuple[Rng, list[_FittedTask]]:
        """Return the tasks of a document, and the generator that its filler is drawn from."""
        rng = philox.generator(self.seed, number, _STREAM)
        room = self.length - (self.eod is not None) - len(self._head)
        return rng, [self._fitted(rng, budget) for budget in _budgets(rng, room, self.tasks)]

    def _joined(self, rng: Rng, parts: list[np.ndarray]) -> np.ndarray:
        end = [] if self.eod is None else [np.array([self.eod])]
        left = self.length - sum(map(len, [*self._head, *parts, *end]))
        whole = [*self._head, self._filler(rng, left), *parts, *end]
        return np.concatenate(whole).astype(np.int64)

    def _answers(self, passages: list[Passage], tokens: np.ndarray) -> np.ndarray:
        """Return bool ``[tokens]``: which tokens have a character of an answer.

        Raises:
            UserError: the tokenizer does not say where its tokens stand.
        """
        for before in (_ANCHOR, ""):  # as encode() does
            found = self.tokenizer.locate(before + _text(passages))
            skipped = len(found.ids) - len(tokens)
            if skipped >= 0 and np.array_equal(found.ids[skipped:], tokens):
                ends = np.cumsum([len(before), *(len(passage.text) for passage in passages)])
                spans = zip(passages, ends.tolist(), ends[1:].tolist(), strict=False)
                answers = [(a, b) for passage, a, b in spans if passage.is_answer]
                return found.overlapping(answers)[skipped:]
        raise UserError(
            "--answers-only: the tokens of a text are not those that the tokenizer locates in it; "
            "needs --engine reference"
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of text that follows a line break and begins with no white space.

        SentencePiece begins a text, but not what follows a line break, with a space of its own.
        """
        tokens = self.tokenizer.encode([_ANCHOR + text])[0]
        size = len(self._anchor)
        if size and np.array_equal(tokens[:size], self._anchor):
            return tokens[size:]
        return self.tokenizer.encode([text])[0]  # the line break went into a token with the text

    def _fitted(self, rng: Rng, budget: int) -> _FittedTask:
        """Return passages and tokens, at most ``budget``, of a task drawn anew until one fits."""
        for _ in range(100):
            task = draw_task(rng, budget, self.haystack, self.questions)
            found = self._largest(task, budget)
            if found is not None:
                return found
        raise UserError(
            f"--length is {self.length}: no task fits in {budget} tokens of this tokenizer; it "
            "must be longer"
        )

    def _largest(self, task: RetrievalTask, budget: int) -> _FittedTask | None:
        """Return the task at nearly the largest size that fits, None where the smallest does not.

        The tokens of two small sizes say how many the others have, nearly.
        """
        small, more = (min(size, task.most) for size in (_SIZES if budget > 2048 else (4, 24)))
        a, b = (len(self.encode(task.text(size))) for size in (small, more))
        each = max((b - a) / max(1, more - small), 0.5)
        size = min(task.most, int(small + (0.97 * budget - a) / each))
        while size >= 1:
            passages = task.passages(size)
            tokens = self.encode(_text(passages))
            if len(tokens) <= budget:
                return passages, tokens
            size = min(size - 1, int(size * 0.97 * budget / len(tokens)))
        return None

    def _filler(self, rng: Rng, count: int) -> np.ndarray:
        """Return the last ``count`` tokens of some text that ends in a line break."""
        characters, tokens = 5 * count + 64, np.zeros(0, dtype=np.int64)
        while len(tokens) < count:
            drawn = self.haystack.passage(rng, characters) if self.haystack else None
            text = prose(rng, characters) if drawn is None else drawn
            tokens = self.encode(text.strip() + "\n")
            characters *= 2
        return tokens[len(tokens) - count :]


def _budgets(rng: Rng, tokens: int, most: int) -> list[int]:
    """Share tokens among one task, mostly, or up to ``most``, of at most four."""
    most = min(most, tokens // _LEAST)
    count = min(most, int(rng.choice([1, 1, 1, 2, 2, 3, 4]))) if most > 1 else 1
    spare = tokens - count * _LEAST
    if count == 1:
        return [tokens]
    shares = rng.dirichlet(np.ones(count))
    return [_LEAST + int(spare * share) for share in shares.tolist()]
