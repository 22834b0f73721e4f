# SPDX-License-Identifier: Apache-2.0
"""Describes and checks an indexed dataset, and decodes its documents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.settings import validate_count
from megatron_cream.corpus.statistics import draw_histogram, measure, median
from megatron_cream.corpus.tokenizers import TOKENIZERS, load_tokenizer
from megatron_cream.data.indexed import (
    check_tokens,
    read_index,
    read_metadata,
    validate_metadata,
)
from megatron_cream.errors import UserError

EXAMPLES = """
    megatron-cream inspect data/train --seq-length 4096 --target-length 262144
    megatron-cream inspect data/train --document 17 --tokens 200
    megatron-cream inspect data/train --check

The whole index is checked in every case; --check also reads every token.
"""


def describe(prefix: str, thresholds: tuple[int | None, ...] = ()) -> str:
    """Return statistics and the length histogram of a dataset, as lines.

    Args:
        prefix: path of the dataset without suffix.
        thresholds: ``--seq-length`` and ``--target-length``, to say which share is as long.

    Raises:
        UserError: a damaged or truncated file.
        FileNotFoundError: a missing one.
    """
    for flag, value in zip(("--seq-length", "--target-length"), thresholds, strict=False):
        validate_count(flag, value, fewest=1)
    index, note = read_index(prefix), read_metadata(prefix)
    validate_metadata(index, note)
    thresholds = tuple(n for n in thresholds if n is not None)
    found = measure(index.lengths, thresholds)
    size = Path(prefix + ".bin").stat().st_size
    lines = [
        f"documents: {len(index.documents) - 1}",
        f"sequences: {found.documents}",
        f"tokens: {found.tokens}, {index.dtype}, {size} bytes",
        f"tokens per sequence: mean {found.tokens / found.documents:.1f}, "
        f"median {median(index.lengths):.1f}, longest {found.longest}",
        draw_histogram(found.histogram()),
    ]
    lines += [f"sequences of at least {n} tokens: {s:.1%}" for n, s in found.shares().items()]
    return "\n".join(lines + _noted(note))


def check(prefix: str, vocab_size: int | None = None) -> str:
    """Read the whole dataset and return a line that says it is sound.

    Args:
        prefix: path of the dataset without suffix.
        vocab_size: what all ids must be below; None for what ``PREFIX.json`` says, if there is one.

    Raises:
        UserError: the index and the file do not fit, or a token is outside the vocabulary.
        FileNotFoundError: a file is missing.
    """
    index, note = read_index(prefix), read_metadata(prefix)
    validate_metadata(index, note)
    validate_count("--vocab-size", vocab_size, fewest=1)
    limits = [vocab_size, None if note is None else note["vocab_size"]]
    largest = check_tokens(index, min((n for n in limits if n is not None), default=None))
    tokens = int(index.lengths.sum(dtype=np.int64))
    line = f"sound: {tokens} tokens in {len(index.lengths)} sequences, largest id {largest}"
    unknown = note is None and vocab_size is None
    return f"{line} (compared with no vocabulary, which --vocab-size gives)" if unknown else line


def document_text(
    prefix: str, number: int, tokenizer_type: str | None, tokenizer_model: str | None, tokens: int
) -> str:
    """Return the text of the first ``tokens`` tokens of document ``number``, from 0.

    Args:
        prefix: path of the dataset without suffix.
        number: the document.
        tokenizer_type, tokenizer_model: None for what ``PREFIX.json`` says.
        tokens: 0 for all.

    Raises:
        UserError: there is no such document, no word of the tokenizer, or an id it has not.
    """
    validate_count("--tokens", tokens, fewest=0)
    index, note = read_index(prefix), read_metadata(prefix)
    validate_metadata(index, note)
    documents = len(index.documents) - 1
    if not 0 <= number < documents:
        raise UserError(f"--document {number}: needs 0 to {documents - 1}")
    if tokenizer_type is None:
        if note is None:
            raise UserError(f"--tokenizer-type: needed, there is no {prefix}.json that names it")
        tokenizer_type, tokenizer_model = note["tokenizer_type"], note["tokenizer_model"]
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    first, end = index.documents[number], index.documents[number + 1]
    if first == end:
        return ""
    start = int(index.pointers[first]) // index.dtype.itemsize
    count = int(index.lengths[first:end].sum(dtype=np.int64))
    data = np.memmap(prefix + ".bin", mode="r", dtype=index.dtype)
    ids = np.array(data[start : start + min(count, tokens or count)])
    if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise UserError(
            f"{prefix}.bin holds ids {ids.min()} to {ids.max()} in document {number}, needs 0 to "
            f"{tokenizer.vocab_size - 1}, those of the tokenizer"
        )
    return tokenizer.decode(ids)


def _noted(note: dict[str, Any] | None) -> list[str]:
    if note is None:
        return ["no note beside it: another tool wrote it"]
    dropped = ", ".join(f"{count} {why}" for why, count in note["dropped"].items())
    errors = ", ".join(f"{count} {kind}" for kind, count in note.get("errors", {}).items())
    return [
        f"tokenizer: {note['tokenizer_type']} {note['tokenizer_model'] or ''}".rstrip(),
        f"eod {note['eod_id']} {'after each document' if note['appended_eod'] else 'not added'}, "
        f"bos {note['bos_id']} {'before each document' if note['prepended_bos'] else 'not added'}",
        f"dropped: {dropped.replace('_', ' ')}",
        f"bad records: {errors or 'none'}",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the dataset without .bin and .idx")
    text = "print only the text of document I, from 0 (default: statistics)"
    add("--document", type=int, metavar="I", help=text)
    add("--tokens", type=int, default=0, metavar="N", help="its first N tokens, 0 for all")
    noted = "default: what PREFIX.json says"
    add("--tokenizer-type", choices=list(TOKENIZERS), help=f"to print text with ({noted})")
    add("--tokenizer-model", metavar="PATH", help=f"of that type ({noted})")
    share = "share of sequences as long (default: not reported)"
    add("--seq-length", type=int, metavar="N", help=share)
    add("--target-length", type=int, metavar="T", help=share)
    add("--check", action="store_true", help="read all tokens, too")
    add("--vocab-size", type=int, metavar="N", help=f"all ids are below it ({noted})")


def run(args: argparse.Namespace) -> None:
    """Print what a command line asks for."""
    if args.document is not None:
        model = (args.tokenizer_type, args.tokenizer_model)
        print(document_text(args.prefix, args.document, *model, args.tokens))
    else:
        print(describe(args.prefix, (args.seq_length, args.target_length)))
    if args.check:
        print(check(args.prefix, args.vocab_size))
