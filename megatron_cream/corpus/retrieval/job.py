# SPDX-License-Identifier: Apache-2.0
"""Retrieval documents to an indexed dataset, by any number of workers the same bytes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream.corpus.engine import ENGINES, choose_engine
from megatron_cream.corpus.executors import choose_start_method, use_one_thread
from megatron_cream.corpus.gigatoken import GigatokenSource, GigatokenTokenizer
from megatron_cream.corpus.retrieval.documents import DocumentMaker
from megatron_cream.corpus.retrieval.haystack import read_haystack
from megatron_cream.corpus.retrieval.tasks import MOST_QUESTIONS
from megatron_cream.corpus.statistics import Counts, make_metadata, measure
from megatron_cream.corpus.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from megatron_cream.corpus.work_folder import (
    RETRIEVAL,
    WorkFolder,
    finish_publishing,
    publish,
    validate_absent,
    validate_prefix,
)
from megatron_cream.data.indexed import token_dtype, write_index
from megatron_cream.errors import UserError

_BLOCK = 16  # documents that a worker makes at a time

EXAMPLES = """
    megatron-cream retrieval-data --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer/ --length 8192 --documents 3000 --haystack books/train \\
        --workers 8 --output-prefix data/retrieval

Train on a blend: --data-path 0.85 data/train 0.15 data/retrieval. See docs/data.md.
"""


@dataclass(frozen=True)
class RetrievalConfig:
    """A job; the fields are the flags of ``megatron-cream retrieval-data``.

    Attributes:
        length: tokens of a document, end of document included: the trained window N.
        haystack: files and folders of text; none for sentences made here.
        questions: most questions of a task.
    """

    tokenizer_type: str
    output_prefix: str
    length: int
    documents: int
    tokenizer_model: str | None = None
    seed: int = 1234
    haystack: tuple[str, ...] = ()
    append_eod: bool = False
    questions: int = MOST_QUESTIONS
    engine: str = "auto"
    workers: int = 1
    overwrite: bool = False


def make_dataset(
    config: RetrievalConfig,
    *,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Write ``PREFIX.bin``, ``.idx`` and ``.json``; returns the content of the last.

    Raises:
        UserError: a setting that cannot work.
        OSError: a file that is missing or exists, or cannot be written.
    """
    _check(config)
    with WorkFolder(config.output_prefix, RETRIEVAL) as folder, use_one_thread():
        if folder.is_whole():
            finish_publishing(folder.staged, config.output_prefix)
        validate_absent(config.output_prefix, config.overwrite)
        maker = _maker(config)
        _choose_engine(config, maker, say)
        note = _write(config, maker, folder.staged, progress)
        publish(folder.staged, config.output_prefix, config.overwrite)
        folder.remove()
    return note


def _check(config: RetrievalConfig) -> None:
    counts = ("documents", "workers", "questions")
    for flag, value in ((f"--{name}", getattr(config, name)) for name in counts):
        if value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1")
    if config.seed < 0:
        raise UserError(f"--seed is {config.seed}: it must be 0 or more")
    validate_prefix(config.output_prefix)


def _maker(config: RetrievalConfig) -> DocumentMaker:
    tokenizer = load_tokenizer(config.tokenizer_type, config.tokenizer_model)
    if config.append_eod and tokenizer.eod is None:
        raise UserError("--append-eod: the tokenizer has no token that ends a document")
    haystack = read_haystack(list(config.haystack)) if config.haystack else None
    eod = tokenizer.eod if config.append_eod else None
    return DocumentMaker(tokenizer, config.length, config.seed, haystack, eod, config.questions)


def _choose_engine(
    config: RetrievalConfig, maker: DocumentMaker, say: Callable[[str], object]
) -> None:
    """Have ``maker`` use the fast tokenizer where it is exact, also on what is made here."""
    samples = [text for number in range(2) for text in maker.task_texts(number)]
    fast, reason = choose_engine(config.engine, maker.tokenizer, samples)
    say(reason)
    maker.tokenizer = fast or maker.tokenizer


def _write(
    config: RetrievalConfig, maker: DocumentMaker, staged: str, progress: bool
) -> dict[str, Any]:
    dtype = token_dtype(maker.tokenizer.vocab_size)
    lengths = np.full(config.documents, config.length, dtype=np.int32)
    bar = tqdm(total=config.documents, unit="doc", disable=not progress)
    with open(staged + ".bin", "wb") as file, bar:
        for block in _blocks(config, maker, dtype):
            file.write(block.tobytes())
            bar.update(len(block))
    ones = np.ones(config.documents, dtype=np.int64)
    write_index(staged + ".idx", dtype, [(lengths, ones)], config.documents, config.documents)
    settings = _noted(config, maker.tokenizer, dtype)
    found = Counts({}, longest=config.length)
    note = make_metadata(settings, measure(lengths), config.documents, float(config.length), found)
    Path(staged + ".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note


def _noted(config: RetrievalConfig, tokenizer: Tokenizer, dtype: np.dtype) -> dict[str, Any]:
    return {
        "kind": "retrieval",
        "seed": config.seed,
        "length": config.length,
        "haystack": list(config.haystack),
        "questions": config.questions,
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
        "bos_id": tokenizer.bos,
        "appended_eod": config.append_eod,
        "prepended_bos": False,
        "min_tokens": 1,
        "max_tokens": None,
        "dtype": dtype.name,
    }


def _blocks(config: RetrievalConfig, maker: DocumentMaker, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield ``[documents of a block, length]`` tokens, in order."""
    firsts = range(0, config.documents, _BLOCK)
    ranges = [(first, min(first + _BLOCK, config.documents), dtype) for first in firsts]
    if config.workers == 1:
        yield from (_make_block(maker, *one) for one in ranges)
        return
    context = get_context(choose_start_method())
    workers = min(config.workers, len(ranges))
    given = (config, getattr(maker.tokenizer, "source", None))
    with ProcessPoolExecutor(workers, context, _start, given) as pool:
        yield from pool.map(_in_worker, ranges)


def _make_block(maker: DocumentMaker, first: int, end: int, dtype: np.dtype) -> np.ndarray:
    return np.stack([maker.make(number) for number in range(first, end)]).astype(dtype)


_workers_maker: DocumentMaker | None = None


def _start(config: RetrievalConfig, source: GigatokenSource | None) -> None:
    """In a worker, which may be a fresh interpreter: make its own maker."""
    global _workers_maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers_maker = _maker(config)
    if source is not None:
        reference = _workers_maker.tokenizer
        _workers_maker.tokenizer = GigatokenTokenizer(source, lambda: reference)


def _in_worker(block: tuple[int, int, np.dtype]) -> np.ndarray:
    return _make_block(_workers_maker, *block)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a job."""
    add = parser.add_argument
    model = "tokenizer.json, its folder, or a .model file (default: none, for plain bytes)"
    add("--tokenizer-type", required=True, choices=list(TOKENIZERS), help="how text becomes ids")
    add("--tokenizer-model", metavar="PATH", help=model)
    add("--length", type=int, required=True, metavar="N", help="tokens of each: the trained window")
    add("--documents", type=int, required=True, metavar="D", help="how many")
    add("--seed", type=int, default=1234, help="what they are drawn from")
    hay = "text to hide facts in (default: sentences made here)"
    add("--haystack", nargs="+", default=[], metavar="TEXT", help=hay)
    add("--questions", type=int, default=16, metavar="Q", help="most questions of a task")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--engine", choices=ENGINES, default="auto", help="auto takes gigatoken where exact")
    add("--workers", type=int, default=1, metavar="W", help="processes")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")


def run(args: argparse.Namespace) -> None:
    """Run the job of a command line, and print what it wrote."""
    config = RetrievalConfig(**{**vars(args), "haystack": tuple(args.haystack)})
    note = make_dataset(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(
        f"written: {note['documents']} documents, {note['tokens']} tokens, {config.output_prefix}"
    )
