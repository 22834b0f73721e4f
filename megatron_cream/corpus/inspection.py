# SPDX-License-Identifier: Apache-2.0
"""Describes datasets: their lengths, the content of `PREFIX.json`, a full check, their text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.tokenizers import TOKENIZERS, load_tokenizer
from megatron_cream.data.indexed import (
    DatasetIndex,
    blocks,
    check_tokens,
    read_index,
    read_metadata,
    validate_metadata,
)
from megatron_cream.data.token_mask import check_mask, describe_mask, has_mask, trained_tokens
from megatron_cream.errors import UserError
from megatron_cream.options import validate_count

FORMAT_VERSION = 1
DUPLICATES = "duplicates"
FINGERPRINT = "fingerprint"
LISTED_ERRORS = 1000
"""Bad records that are named one by one; all are counted."""

EXAMPLES = """
    megatron-cream inspect data/train --seq-length 4096 --target-length 262144
    megatron-cream inspect data/train --document 17 --tokens 200
    megatron-cream inspect data/train --check

The whole index is checked in every case; --check also reads every token.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream inspect``."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the dataset without .bin and .idx")
    text = "print only the text of document I, from 0 (default: statistics)"
    add("--document", type=int, metavar="I", help=text)
    add("--tokens", type=int, default=0, metavar="N", help="its first N tokens, 0 for all")
    described = "default: what PREFIX.json says"
    add("--tokenizer-type", choices=list(TOKENIZERS), help=f"to print text with ({described})")
    add("--tokenizer-model", metavar="PATH", help=f"of that type ({described})")
    share = "share of sequences as long (default: not reported)"
    add("--seq-length", type=int, metavar="N", help=share)
    add("--target-length", type=int, metavar="T", help=share)
    add("--check", action="store_true", help="read all tokens, too")
    add("--vocab-size", type=int, metavar="N", help=f"all ids are below it ({described})")


def run(args: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    if args.document is not None:
        model = (args.tokenizer_type, args.tokenizer_model)
        print(document_text(args.prefix, args.document, *model, args.tokens))
    else:
        print(describe(args.prefix, (args.seq_length, args.target_length)))
    if args.check:
        print(check(args.prefix, args.vocab_size))


@dataclass
class Lengths:
    """Counts of document lengths, one block of them at a time.

    Attributes:
        documents, tokens, longest: of all documents.
        bins: how many documents have 2**i to 2**(i + 1) - 1 tokens, i from 0; none has 0 tokens.
        at_least: how many documents have at least so many tokens, for each asked for.
    """

    thresholds: tuple[int, ...] = ()
    documents: int = 0
    tokens: int = 0
    longest: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(63, dtype=np.int64))
    at_least: dict[int, int] = field(default_factory=dict)

    def add(self, lengths: np.ndarray) -> None:
        """Count int64 ``[documents]`` tokens."""
        if not len(lengths):
            return
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))
        # The exponent of frexp is that of the power of two above; exact up to 2**53.
        self.bins += np.bincount(np.frexp(lengths)[1] - 1, minlength=63)[:63]
        for threshold in self.thresholds:
            found = int((lengths >= threshold).sum())
            self.at_least[threshold] = self.at_least.get(threshold, 0) + found

    def histogram(self) -> dict[str, int]:
        """Documents by the fewest tokens of their bin, up to the last bin that has any."""
        last = np.flatnonzero(self.bins)
        stop = int(last[-1]) + 1 if len(last) else 0
        return {str(1 << i): int(self.bins[i]) for i in range(stop)}

    def shares(self) -> dict[str, float]:
        """The share of the documents of at least so many tokens, for each asked for."""
        return {
            str(threshold): self.at_least.get(threshold, 0) / max(self.documents, 1)
            for threshold in self.thresholds
        }


def median(lengths: np.ndarray) -> float:
    """Return the median of non-negative integers below 2**32 that may be a memory map.

    Counts by the upper half of the bits, then by the lower half of those that matter, so that no
    copy of all of them is made.
    """
    count = len(lengths)
    if not count:
        return 0.0
    return (_nth(lengths, (count - 1) // 2) + _nth(lengths, count // 2)) / 2


def draw_histogram(histogram: dict[str, int], width: int = 40) -> str:
    """Return a bar for each bin of ``Lengths.histogram``."""
    most = max(histogram.values(), default=0)
    lines = []
    for i, (fewest, count) in enumerate(histogram.items()):
        bar = "#" * -(-count * width // max(most, 1))
        lines.append(f"{fewest:>10} to {(2 << i) - 1:<10} {count:>10}  {bar}".rstrip())
    return "\n".join(lines)


def measure(lengths: np.ndarray, thresholds: Sequence[int] = ()) -> Lengths:
    """Count the lengths of an index."""
    counted = Lengths(tuple(thresholds))
    for block in blocks(lengths):
        counted.add(block)
    return counted


def _nth(lengths: np.ndarray, n: int) -> int:
    upper = _count_values(block >> 16 for block in blocks(lengths))
    high = int(np.searchsorted(np.cumsum(upper), n, side="right"))
    n -= int(upper[:high].sum())
    lower = _count_values(b[b >> 16 == high] & 0xFFFF for b in blocks(lengths))
    return (high << 16) + int(np.searchsorted(np.cumsum(lower), n, side="right"))


def _count_values(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return how often each number of 16 bits is in all of ``arrays``."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for array in arrays:
        counts += np.bincount(array, minlength=1 << 16)
    return counts


@dataclass
class Counts:
    """What did not get into a dataset.

    Attributes:
        dropped: documents by reason.
        errors: bad records by kind.
        listed: file and line, and what is wrong with it, of the first bad records.
        longest: tokens of the longest document, before eod and bos, kept or not.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    listed: list[list[str]] = field(default_factory=list)
    longest: int = 0

    def add(self, dropped: dict[str, int], errors: dict[str, int]) -> None:
        """Add the counts of a part or shard."""
        for total, more in ((self.dropped, dropped), (self.errors, errors)):
            for name, count in more.items():
                total[name] = total.get(name, 0) + count

    def list_errors(self, listed: list[list[str]]) -> None:
        """Add named bad records as long as there is room."""
        self.listed += listed[: LISTED_ERRORS - len(self.listed)]


def write_metadata(
    prefix: str, settings: dict[str, Any], lengths: Lengths, documents: int, counts: Counts
) -> dict[str, Any]:
    """Write ``PREFIX.json`` beside the index of a new dataset; returns its content.

    Args:
        prefix: path of the dataset without suffix.
        settings: of tokenizer and limits, as they stand in the file.
        lengths: of the sequences as written.
        documents: how many documents these are.
        counts: what is not there.
    """
    middle = median(read_index(prefix, empty=True).lengths)
    content = {
        "format_version": FORMAT_VERSION,
        **settings,
        **_counted(lengths, documents, middle, counts),
        **describe_mask(prefix),
    }
    Path(prefix + ".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _counted(lengths: Lengths, documents: int, median: float, counts: Counts) -> dict[str, Any]:
    return {
        "documents": documents,
        "sequences": lengths.documents,
        "tokens": lengths.tokens,
        "dropped": counts.dropped,
        "errors": counts.errors,
        "listed_errors": counts.listed,
        "longest_document": lengths.longest,
        "mean_document": lengths.tokens / max(lengths.documents, 1),
        "median_document": median,
        "documents_by_length": lengths.histogram(),
        "share_at_least": lengths.shares(),
    }


COUNTED_KEYS = frozenset({"format_version", *_counted(Lengths(), 0, 0.0, Counts())})
"""What every ``PREFIX.json`` has beside the settings."""


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
    index, metadata = _read(prefix)
    found = measure(index.lengths, [n for n in thresholds if n is not None])
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
    if has_mask(prefix, found.tokens, metadata):
        trained = trained_tokens(prefix, metadata)
        lines.append(f"loss on {trained} tokens, {trained / found.tokens:.1%}: {prefix}.mask")
    return "\n".join(lines + _describe_metadata(metadata))


def _read(prefix: str) -> tuple[DatasetIndex, dict[str, Any] | None]:
    index, metadata = read_index(prefix), read_metadata(prefix)
    validate_metadata(index, metadata)
    return index, metadata


def check(prefix: str, vocab_size: int | None = None) -> str:
    """Read the whole dataset and return a line that says it is sound.

    Args:
        prefix: path of the dataset without suffix.
        vocab_size: what all ids must be below; None for what ``PREFIX.json`` says, if there is one.

    Raises:
        UserError: the index and the file do not fit, or a token is outside the vocabulary.
        FileNotFoundError: a file is missing.
    """
    index, metadata = _read(prefix)
    validate_count("--vocab-size", vocab_size, fewest=1)
    limits = [vocab_size, None if metadata is None else metadata["vocab_size"]]
    largest = check_tokens(index, min((n for n in limits if n is not None), default=None))
    tokens = int(index.lengths.sum(dtype=np.int64))
    line = f"sound: {tokens} tokens in {len(index.lengths)} sequences, largest id {largest}"
    if has_mask(prefix, tokens, metadata):
        line += f", loss on {_check_whole_mask(prefix, metadata)} of them"
    unknown = metadata is None and vocab_size is None
    return f"{line} (compared with no vocabulary, which --vocab-size gives)" if unknown else line


def _check_whole_mask(prefix: str, metadata: dict[str, Any] | None) -> int:
    trained, said = check_mask(prefix), (metadata or {}).get("trained_tokens")
    if said not in (None, trained):
        raise UserError(
            f"{prefix}.mask has {trained} trained tokens and {prefix}.json records {said}, needs "
            "files of one dataset"
        )
    return trained


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
    index, metadata = _read(prefix)
    documents = len(index.documents) - 1
    if not 0 <= number < documents:
        raise UserError(f"--document {number}: needs 0 to {documents - 1}")
    if tokenizer_type is None:
        if metadata is None:
            raise UserError(f"--tokenizer-type: needed, there is no {prefix}.json that names it")
        tokenizer_type, tokenizer_model = metadata["tokenizer_type"], metadata["tokenizer_model"]
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


def _describe_metadata(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["no note beside it: another tool wrote it"]
    dropped = ", ".join(f"{count} {why}" for why, count in found["dropped"].items())
    errors = ", ".join(f"{count} {kind}" for kind, count in found.get("errors", {}).items())
    eod = "after each document" if found["appended_eod"] else "not added"
    bos = "before each document" if found["prepended_bos"] else "not added"
    return [
        f"tokenizer: {found['tokenizer_type']} {found['tokenizer_model'] or ''}".rstrip(),
        f"eod {found['eod_id']} {eod}, bos {found['bos_id']} {bos}",
        f"dropped: {dropped.replace('_', ' ')}",
        f"bad records: {errors or 'none'}",
    ]
