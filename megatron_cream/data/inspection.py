# SPDX-License-Identifier: Apache-2.0
"""What is in an indexed dataset, and whether its files belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.data.index import DatasetIndex, read_index, read_metadata
from megatron_cream.data.statistics import blocks, draw_histogram, measure, median
from megatron_cream.data.tokenizers import load_tokenizer
from megatron_cream.errors import UserError

_BLOCK_TOKENS = 1 << 24


def describe(prefix: str, thresholds: tuple[int, ...] = ()) -> str:
    """Return statistics and the length histogram of a dataset, as lines.

    Raises:
        UserError: a damaged or truncated file.
        FileNotFoundError: a missing one.
    """
    index, note = read_index(prefix), read_metadata(prefix)
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


def check(prefix: str) -> str:
    """Read the whole dataset and return a line that says it is sound.

    Raises:
        UserError: the index and the file do not fit, or a token is outside the vocabulary.
        FileNotFoundError: a file is missing.
    """
    index, note = read_index(prefix), read_metadata(prefix)
    _check_pointers(index)
    size = Path(prefix + ".bin").stat().st_size
    tokens = int(index.lengths.sum(dtype=np.int64))
    if size != tokens * index.dtype.itemsize:
        raise UserError(
            f"{prefix}.bin has {size} bytes and its index accounts for "
            f"{tokens * index.dtype.itemsize}"
        )
    largest = _largest_token(prefix, index)
    if note is not None and largest >= note["vocab_size"]:
        raise UserError(
            f"{prefix}.bin holds token {largest}, needs all below vocab_size {note['vocab_size']}"
        )
    return f"sound: {tokens} tokens in {len(index.lengths)} sequences, largest id {largest}"


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
        UserError: there is no such document, or no word of the tokenizer.
    """
    index, note = read_index(prefix), read_metadata(prefix)
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
    return tokenizer.decode(data[start : start + min(count, tokens or count)])


def _check_pointers(index: DatasetIndex) -> None:
    byte = at = 0
    for lengths in blocks(index.lengths):
        sizes = lengths * index.dtype.itemsize
        expected = byte + np.cumsum(sizes) - sizes
        wrong = np.flatnonzero(index.pointers[at : at + len(sizes)] != expected)
        if (lengths < 0).any() or len(wrong):
            where = at + (int(wrong[0]) if len(wrong) else 0)
            raise UserError(f"{index.prefix}.idx: sequence {where} does not follow the one before")
        byte += int(sizes.sum())
        at += len(sizes)
    borders = index.documents
    if borders[0] != 0 or borders[-1] != len(index.lengths) or (np.diff(borders) < 0).any():
        raise UserError(f"{index.prefix}.idx: its documents do not cover its sequences")


def _largest_token(prefix: str, index: DatasetIndex) -> int:
    data = np.memmap(prefix + ".bin", mode="r", dtype=index.dtype)
    starts = range(0, len(data), _BLOCK_TOKENS)
    extremes = [
        (int(block.min()), int(block.max()))
        for block in (data[start : start + _BLOCK_TOKENS] for start in starts)
    ]
    if min(low for low, _ in extremes) < 0:
        raise UserError(f"{prefix}.bin holds a negative token")
    return max(high for _, high in extremes)


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
