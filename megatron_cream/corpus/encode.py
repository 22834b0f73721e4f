# SPDX-License-Identifier: Apache-2.0
"""Encodes the units of a job: reads records, tokenizes them, writes parts that outlive a kill.

A part is some files in the job's folder: tokens, lengths, hashes and masks where asked for, and the
metadata that makes it count. One without its metadata was being written when its process ended, and
is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_cream.corpus.fast_encoder import (
    GigatokenTokenizer,
    TextSplitter,
    encode_pieces,
    encode_texts,
    excerpt,
    find_text_splitter,
)
from megatron_cream.corpus.input_files import InputSpan, lines_before, place
from megatron_cream.corpus.inspection import LISTED_ERRORS
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.readers import BadRecord, Stretches, Text, TextRecord, read_span
from megatron_cream.corpus.storage import HASH_BYTES, Segment, SequenceLengths
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.data.indexed import MASK_SUFFIX
from megatron_cream.errors import UserError
from megatron_cream.ownership import sync_and_close, temporary_name, write_whole

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


class UnitEncoder:
    """Encodes units of a job, one after the other.

    Args:
        job: the job.
        on_bytes: called with bytes read from disk, those of finished parts included.
        tokenizer: the job's, where it is loaded already.
    """

    def __init__(
        self,
        job: PreprocessJob,
        on_bytes: Callable[[int], object] = lambda count: None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.job = job
        self.dtype = np.dtype(job.dtype)
        self.tokenizer = tokenizer or job.load_tokenizer()
        self._on_bytes = on_bytes

    @cached_property
    def splitter(self) -> TextSplitter | None:
        """Where long texts may be cut."""
        return find_text_splitter(self.tokenizer)

    def run(self, unit: int) -> None:
        """Write the parts of ``unit`` that are not finished yet.

        Raises:
            UserError: a bad record with ``on_error`` ``fail``, broken data, or ids that differ
                from the reference's.
            OSError: a file that cannot be read or written.
        """
        job = self.job
        # What was read from standard input cannot be read a second time.
        done = [] if job.reads_stdin else finished_parts(job.folder, unit, self.dtype)
        start = done[-1].metadata.next if done else (0, 0, 0)
        if start is None:
            self._on_bytes(sum(span.size for span in job.units[unit]))
            return
        first, offset, number = start
        with ExitStack() as stack:
            part = stack.enter_context(_PartWriter(self, unit, len(done)))
            for i, span in enumerate(job.units[unit][first:], start=first):
                for record in read_span(span, job.fields, offset, number, self._on_bytes):
                    if part.characters >= job.config.part_bytes:
                        part.finish((i, offset, number))
                        part = stack.enter_context(_PartWriter(self, unit, part.number + 1))
                    self._add(part, record, i, span)
                    offset, number = record.offset, record.number
                offset = number = 0
            part.finish(None)

    def _add(self, part: _PartWriter, record: TextRecord, i: int, span: InputSpan) -> None:
        try:
            if record.error is not None:
                raise record.error
            part.add(record.text, record.trained)
        except BadRecord as exc:
            if self.job.config.on_error == "skip":
                part.count_error(i, record.number, exc)
                return
            before = lines_before(span.path, [span.start])[0] if span.start else 0
            raise UserError(f"{place(span, before + record.number)}: {exc}") from exc


class _PartWriter:
    """One part in the making: documents wait until there are enough for one call."""

    def __init__(self, encoder: UnitEncoder, unit: int, number: int) -> None:
        job = encoder.job
        self.number, self.characters = number, 0
        masked = job.config.mask_key is not None
        self._metadata = PartMetadata(hashed=job.config.drop_duplicates, masked=masked)
        self._config, self._encoder = job.config, encoder
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        self._masks: list[bytes] = []
        self._waiting: list[tuple[str, Stretches | None]] = []
        self._waiting_characters = 0
        self._head = [] if job.bos is None else [np.array([job.bos])]
        self._tail = [] if job.eod is None else [np.array([job.eod])]
        self._longest = self._unusual = ""
        self._stem = part_stem(job.folder, unit, number)
        # A worker that outlives its killed parent for a moment must not meet the next one's.
        self._temporary = temporary_name(self._stem)
        self._file = open(self._temporary, "wb")  # noqa: SIM115, __exit__ and finish do

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file; without ``finish`` before, what it holds is gone."""
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)

    def add(self, text: Text, trained: Stretches | None) -> None:
        """Encode a document, soon; one that comes in pieces at once."""
        if not isinstance(text, str):
            self._flush()
            self._stream(text)
            return
        self.characters += len(text)
        self._waiting.append((text, trained))
        self._waiting_characters += len(text)
        if self._waiting_characters >= _BATCH_CHARACTERS or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._flush()

    def count_error(self, span: int, number: int, error: BadRecord) -> None:
        """Count a bad record, and list one of the first."""
        found = self._metadata
        found.errors[error.kind] = found.errors.get(error.kind, 0) + 1
        if len(found.listed) < LISTED_ERRORS:
            found.listed.append((span, number, error.kind, str(error)))

    def finish(self, next_place: UnitPlace | None) -> None:
        """Make the part count, once samples of its hardest texts have the reference's ids.

        Raises:
            OSError: the files cannot be written; nothing then counts as finished.
        """
        self._flush()
        tokenizer = self._encoder.tokenizer
        if isinstance(tokenizer, GigatokenTokenizer) and not tokenizer.verify_all:
            samples = [excerpt(text) for text in (self._longest, self._unusual) if text]
            tokenizer.verify(samples, tokenizer.encode(samples))
        self._metadata.documents = len(self._lengths)
        self._metadata.next = next_place
        sync_and_close(self._file)
        os.replace(self._temporary, self._stem + ".bin")
        write_whole(self._stem + ".len", np.array(self._lengths, dtype="<i8").tobytes())
        if self._metadata.hashed:
            write_whole(self._stem + ".hash", b"".join(self._hashes))
        if self._metadata.masked:
            write_whole(self._stem + MASK_SUFFIX, b"".join(self._masks))
        write_whole(self._stem + ".json", json.dumps(asdict(self._metadata)).encode())

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_characters = self._waiting, [], 0
        texts = [text for text, _ in waiting]
        located = [self._encoder.tokenizer.locate(t) for t in texts if self._metadata.masked]
        encoded = [found.ids for found in located] or self._encode(texts)
        rows: list[np.ndarray] = []
        for i, ids in enumerate(encoded):
            if not self._fits(len(ids)):
                continue
            rows += [*self._head, ids, *self._tail]
            self._count(len(ids), _new_hash(texts[i].encode()) if self._metadata.hashed else None)
            if located:
                mask = located[i].overlapping(waiting[i][1] or ()).astype(np.uint8).tobytes()
                self._masks.append(bytes(len(self._head)) + mask + bytes(len(self._tail)))
        if rows:
            # One conversion for many documents; ids are below the vocabulary, so they fit.
            self._file.write(np.concatenate(rows, dtype=self._encoder.dtype, casting="unsafe"))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        for text in texts:
            if len(text) > len(self._longest):
                self._longest = text
            if not self._unusual and not text.isascii():
                self._unusual = text
        return encode_texts(self._encoder.tokenizer, texts, lambda: self._encoder.splitter)

    def _stream(self, pieces: Iterator[str]) -> None:
        """Write a document bit by bit, and undo it if it turns out bad or of a wrong length."""
        start, count, state = self._file.tell(), 0, _new_hash()
        try:
            for ids in self._head:
                self._write_ids(ids)
            encoder, seen = self._encoder, self._seen(pieces, state)
            for ids in encode_pieces(encoder.tokenizer, encoder.splitter, seen):
                self._write_ids(ids)
                count += len(ids)
            for ids in self._tail:
                self._write_ids(ids)
        except BadRecord:
            self._truncate(start)
            raise
        if self._fits(count):
            self._count(count, state if self._metadata.hashed else None)
        else:
            self._truncate(start)

    def _truncate(self, size: int) -> None:
        self._file.seek(size)
        self._file.truncate()

    def _write_ids(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._encoder.dtype))

    def _seen(self, pieces: Iterator[str], state: hashlib.blake2b) -> Iterator[str]:
        for piece in pieces:
            self.characters += len(piece)
            if self._metadata.hashed:
                state.update(piece.encode())
            yield piece

    def _fits(self, tokens: int) -> bool:
        """Return whether a document of so many tokens is kept; count it if it is not."""
        config, found = self._config, self._metadata
        found.longest = max(found.longest, tokens)
        if tokens < config.min_tokens:
            found.shorter += 1
            return False
        if config.drops_long and config.max_tokens is not None and tokens > config.max_tokens:
            found.longer += 1
            return False
        return True

    def _count(self, tokens: int, text_hash: hashlib.blake2b | None) -> None:
        """Count a document that is kept."""
        length = tokens + len(self._head) + len(self._tail)
        self._lengths.append(length)
        self._metadata.tokens += length
        if text_hash is not None:
            self._hashes.append(text_hash.digest())


def _new_hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=HASH_BYTES)


UnitPlace = tuple[int, int, int]
"""A record of a unit: which span, offset in it, and how many records of the span are before it."""


@dataclass
class PartMetadata:
    """What a part holds, and where its unit goes on.

    Attributes:
        documents, tokens: as kept, eod and bos included.
        longest: tokens of the longest document, before eod and bos, kept or not.
        shorter, longer: documents dropped for their length.
        errors: how many bad records of each kind.
        listed: span of the unit, number in it, kind and detail of bad records.
        next: where the next part of the unit starts; None at the end.
        hashed: whether a hash of each document's text is kept.
        masked: whether a mask says which tokens are trained.
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    shorter: int = 0
    longer: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    listed: list[tuple[int, int, str, str]] = field(default_factory=list)
    next: UnitPlace | None = None
    hashed: bool = False
    masked: bool = False


@dataclass(frozen=True)
class EncodedPart:
    """A finished part."""

    stem: str
    unit: int
    metadata: PartMetadata

    def lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document, eod and bos included."""
        return np.fromfile(self.stem + ".len", dtype="<i8")

    def hashes(self) -> np.ndarray:
        """Bytes ``[documents]`` of HASH_BYTES each; only of a hashed part."""
        return np.fromfile(self.stem + ".hash", dtype=f"V{HASH_BYTES}")

    def segment(self, job: PreprocessJob) -> Segment:
        """The part as a stretch of the job's dataset, long documents split."""
        head, tail = int(job.bos is not None), int(job.eod is not None)
        most = None if job.config.drops_long else job.config.max_tokens
        return Segment(
            self.stem + ".bin",
            self.metadata.documents,
            lambda: split(self.lengths(), most, head, tail),
            self.hashes,
            self.stem + MASK_SUFFIX if self.metadata.masked else None,
        )


def finished_parts(folder: Path, unit: int, dtype: np.dtype) -> list[EncodedPart]:
    """Return the whole parts of a unit, in order, as far as they follow each other."""
    parts: list[EncodedPart] = []
    while parts == [] or parts[-1].metadata.next is not None:
        part = _read_part(part_stem(folder, unit, len(parts)), unit, dtype)
        if part is None:
            break
        parts.append(part)
    return parts


def finished_units(job: PreprocessJob, units: Iterable[int]) -> list[EncodedPart]:
    """Return all parts of all ``units``, in order.

    Raises:
        UserError: one is missing.
    """
    parts: list[EncodedPart] = []
    for unit in units:
        parts += finished_parts(job.folder, unit, job.dtype)
        if parts == [] or parts[-1].unit != unit or parts[-1].metadata.next is not None:
            raise UserError(f"--output-prefix {job.prefix}: {job.folder} lost parts, start again")
    return parts


def part_stem(folder: Path, unit: int, number: int) -> str:
    """Return the path of a part without suffix."""
    return str(folder / f"{unit:08d}-{number:06d}")


def _read_part(stem: str, unit: int, dtype: np.dtype) -> EncodedPart | None:
    """Return a part, None where its files are not as long as its metadata says."""
    try:
        found = PartMetadata(**json.loads(Path(stem + ".json").read_bytes()))
        if found.next is not None:
            span, offset, number = found.next
            found.next = (span, offset, number)
        sizes = {".bin": found.tokens * dtype.itemsize, ".len": found.documents * 8}
        if found.hashed:
            sizes[".hash"] = found.documents * HASH_BYTES
        if found.masked:
            sizes[MASK_SUFFIX] = found.tokens
        if any(os.path.getsize(stem + suffix) != size for suffix, size in sizes.items()):
            return None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return EncodedPart(stem, unit, found)


def split(lengths: np.ndarray, max_tokens: int | None, head: int, tail: int) -> SequenceLengths:
    """Return the sequences of documents that are split every ``max_tokens`` tokens.

    The tokens stay as they are: bos, which is not counted, is in the first sequence of a document
    and eod in the last.

    Args:
        lengths: int64 ``[documents]``, bos and eod included.
        max_tokens: None for one sequence per document.
        head, tail: 1 where there is a bos or an eod, else 0.
    """
    if max_tokens is None:
        return lengths, np.ones(len(lengths), dtype=np.int64)
    content = lengths - head - tail
    counts = np.maximum(-(-content // max_tokens), 1)
    sequences = np.full(int(counts.sum()), max_tokens, dtype=np.int64)
    last = np.cumsum(counts) - 1
    sequences[last] = content - (counts - 1) * max_tokens + tail
    sequences[last - counts + 1] += head
    return sequences, counts
