# SPDX-License-Identifier: Apache-2.0
"""Describes datasets: what stands in ``PREFIX.json``, a full check, their text."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.tokenizers import TOKENIZERS, load_tokenizer
from megatron_cream.data.indexed import (
    MASK_SUFFIX,
    DatasetFiles,
    blocks,
    check_mask,
    check_tokens,
    read_index,
)
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


def count_lengths(lengths: np.ndarray, thresholds: Sequence[int] = ()) -> dict[str, Any]:
    """Return what ``PREFIX.json`` says of the lengths of a dataset.

    Args:
        lengths: int32 ``[sequences]``, tokens in each, maybe a memory map; looked at in blocks.
        thresholds: lengths to count the sequences of.
    """
    tokens, longest = 0, 0
    bins = np.zeros(63, dtype=np.int64)  # of 2**i to 2**(i + 1) - 1 tokens; none has 0 tokens
    at_least = dict.fromkeys(thresholds, 0)
    for block in blocks(lengths):
        tokens += int(block.sum())
        longest = max(longest, int(block.max()))
        # The exponent of frexp is that of the power of two above; exact up to 2**53.
        bins += np.bincount(np.frexp(block)[1] - 1, minlength=63)[:63]
        for threshold in thresholds:
            at_least[threshold] += int((block >= threshold).sum())
    count = max(len(lengths), 1)
    return {
        "sequences": len(lengths),
        "tokens": tokens,
        "longest_document": longest,
        "mean_document": tokens / count,
        "median_document": median(lengths),
        "documents_by_length": {
            str(1 << i): int(found) for i, found in enumerate(np.trim_zeros(bins, "b"))
        },
        "share_at_least": {str(n): found / count for n, found in at_least.items()},
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
    """Return a bar for each bin of ``documents_by_length``."""
    most = max(histogram.values(), default=0)
    lines = []
    for i, (fewest, count) in enumerate(histogram.items()):
        bar = "#" * -(-count * width // max(most, 1))
        lines.append(f"{fewest:>10} to {(2 << i) - 1:<10} {count:>10}  {bar}".rstrip())
    return "\n".join(lines)


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


@dataclass(frozen=True)
class PreprocessStats:
    """What a job did. Lengths are in tokens as written, eod and bos included.

    Attributes:
        metadata: the content of `PREFIX.json`.
        skipped_files: files of folders that were not taken.
        input_bytes: read from disk.
        seconds: this process took, without what was finished before it started.
        files: that were written.
        finished_before: whether this very job had been done by an earlier process.
    """

    metadata: dict[str, Any]
    skipped_files: int
    input_bytes: int
    seconds: float
    files: tuple[str, ...]
    finished_before: bool = False

    @property
    def documents(self) -> int:
        """Documents written."""
        return self.metadata["documents"]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.metadata["tokens"]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document written."""
        return self.metadata["longest_document"]

    @property
    def _speed(self) -> float:
        return self.input_bytes / 1e6 / self.seconds

    def summary(self) -> str:
        """Lines for a person; MB/s is in bytes of input read, 10**6 to the MB."""
        found = self.metadata
        dropped = ", ".join(f"{count} {why}" for why, count in found["dropped"].items() if count)
        errors = ", ".join(f"{count} {kind}" for kind, count in found["errors"].items())
        shares = (f"{share:.1%} of {n}" for n, share in found["share_at_least"].items())
        lines = [
            f"documents: {found['documents']}",
            f"tokens: {found['tokens']}",
            f"dropped: {dropped.replace('_', ' ') or 'none'}",
            f"bad records: {errors or 'none'}",
            f"left out: {self.skipped_files} files of other kinds",
            f"tokens per document: {_describe_mean(found)}",
            draw_histogram(found["documents_by_length"]),
            f"documents of at least so many tokens: {', '.join(shares)}",
            "" if self.finished_before else f"speed: {self._speed:.2f} MB/s",
            f"{'finished before' if self.finished_before else 'written'}: {' '.join(self.files)}",
        ]
        return "\n".join(line for line in lines if line and not line.endswith("tokens: "))


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
    files = DatasetFiles.open(prefix)
    index, metadata = files.index, files.metadata
    found = count_lengths(index.lengths, [n for n in thresholds if n is not None])
    tokens, size = found["tokens"], Path(prefix + ".bin").stat().st_size
    lines = [
        f"documents: {len(index.documents) - 1}",
        f"sequences: {found['sequences']}",
        f"tokens: {tokens}, {index.dtype}, {size} bytes",
        f"tokens per sequence: {_describe_mean(found)}",
        draw_histogram(found["documents_by_length"]),
    ]
    shares = found["share_at_least"].items()
    lines += [f"sequences of at least {n} tokens: {share:.1%}" for n, share in shares]
    if files.masked:
        trained = files.trained_tokens()
        lines.append(f"loss on {trained} tokens, {trained / tokens:.1%}: {prefix}.mask")
    return "\n".join(lines + _describe_metadata(metadata))


def _describe_mean(found: dict[str, Any]) -> str:
    mean, median = found["mean_document"], found["median_document"]
    return f"mean {mean:.1f}, median {median:.1f}, longest {found['longest_document']}"


def check(prefix: str, vocab_size: int | None = None) -> str:
    """Read the whole dataset and return a line that says it is sound.

    Args:
        prefix: path of the dataset without suffix.
        vocab_size: what all ids must be below; None for what ``PREFIX.json`` says, if there is one.

    Raises:
        UserError: the index and the file do not fit, or a token is outside the vocabulary.
        FileNotFoundError: a file is missing.
    """
    files = DatasetFiles.open(prefix)
    index, metadata = files.index, files.metadata
    validate_count("--vocab-size", vocab_size, fewest=1)
    limits = [vocab_size, None if metadata is None else metadata["vocab_size"]]
    largest = check_tokens(index, min((n for n in limits if n is not None), default=None))
    line = f"sound: {index.tokens} tokens in {len(index.lengths)} sequences, largest id {largest}"
    if files.masked:
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
    files = DatasetFiles.open(prefix)
    index, metadata = files.index, files.metadata
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


@dataclass
class Counts:
    """What did not get into a dataset.

    Attributes:
        dropped: documents by reason.
        errors: bad records by kind.
        listed: file and line, and what is wrong with it, of the first bad records.
        longest: tokens of the longest document, before eod and bos, kept or not.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    listed: list[list[str]] = field(default_factory=list)
    longest: int = 0

    def add(self, dropped: dict[str, int], errors: dict[str, int]) -> None:
        """Add the counts of a part or shard."""
        self.dropped.update(dropped)
        self.errors.update(errors)

    def list_errors(self, listed: list[list[str]]) -> None:
        """Add named bad records as long as there is room."""
        self.listed += listed[: LISTED_ERRORS - len(self.listed)]


def write_metadata(
    prefix: str, settings: dict[str, Any], counts: Counts, thresholds: Sequence[int] = ()
) -> dict[str, Any]:
    """Write ``PREFIX.json`` beside the index of a new dataset; returns its content.

    Args:
        prefix: path of the dataset without suffix.
        settings: of tokenizer and limits, as they stand in the file.
        counts: what is not there.
        thresholds: lengths to count the sequences of.
    """
    index, mask = read_index(prefix, empty=True), prefix + MASK_SUFFIX
    masked: dict[str, int] = {}
    if os.path.isfile(mask):
        masked = {"mask_bytes": os.path.getsize(mask), "trained_tokens": check_mask(prefix)}
    content = {
        "format_version": FORMAT_VERSION,
        **settings,
        "documents": len(index.documents) - 1,
        **count_lengths(index.lengths, thresholds),
        "dropped": counts.dropped,
        "errors": counts.errors,
        "listed_errors": counts.listed,
        **masked,
    }
    Path(prefix + ".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


COUNTED_KEYS = frozenset(
    {"format_version", "documents", "dropped", "errors", "listed_errors"}
    | count_lengths(np.zeros(0, dtype=np.int32)).keys()
)
"""What every ``PREFIX.json`` has beside the settings."""
