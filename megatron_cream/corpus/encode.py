# SPDX-License-Identifier: Apache-2.0
"""Encodes a unit of a job: reads its records, tokenizes them, writes its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np

from megatron_cream.corpus.engine import CheckedTokenizer, excerpt
from megatron_cream.corpus.gigatoken import GigatokenTokenizer
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.jsonl import BadRecord, Record, Text
from megatron_cream.corpus.readers import lines_before, place, read_span
from megatron_cream.corpus.split_points import (
    CUT_CHARACTERS,
    TextSplitter,
    encode_long,
    encode_pieces,
    find_text_splitter,
)
from megatron_cream.corpus.storage import HASH_BYTES, PartWriter, finished_parts
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.errors import UserError

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
        self.checked: CheckedTokenizer | None = None
        if isinstance(self.tokenizer, GigatokenTokenizer):
            self.checked = CheckedTokenizer(self.tokenizer)
            if job.verify_all:
                self.tokenizer = self.checked
        self._on_bytes = on_bytes
        self._splitter: TextSplitter | None = None
        self._splitter_found = False

    @property
    def splitter(self) -> TextSplitter | None:
        """Where long texts may be cut."""
        if not self._splitter_found:
            reference = self.checked.fast.reference if self.checked else self.tokenizer
            self._splitter, self._splitter_found = find_text_splitter(reference), True
        return self._splitter

    def run(self, unit: int) -> None:
        """Write the parts of ``unit`` that are not finished yet.

        Raises:
            UserError: a bad record with ``on_error`` ``fail``, broken data, or ids that differ
                from the reference's.
            OSError: a file that cannot be read or written.
        """
        done = finished_parts(self.job.folder, unit, self.dtype)
        if done and done[-1].note.next is None:
            self._on_bytes(self.job.unit_size(unit))
            return
        number = len(done)
        with ExitStack() as stack:
            part = stack.enter_context(_PartEncoder(self, unit, number))
            for at, record in self._records(unit, done[-1].note.next if done else (0, 0, 0)):
                if part.characters >= self.job.part_bytes:
                    part.finish(at)
                    number += 1
                    part = stack.enter_context(_PartEncoder(self, unit, number))
                self._take(unit, part, at[0], record)
            part.finish(None)

    def _records(
        self, unit: int, start: tuple[int, int, int]
    ) -> Iterator[tuple[tuple[int, int, int], Record]]:
        """Yield each record of a unit with the place it starts at, for a later start."""
        first, offset, number = start
        pieces = self.job.units[unit]
        for i in range(first, len(pieces)):
            for record in read_span(pieces[i], self.job.fields, offset, number, self._on_bytes):
                yield (i, offset, number), record
                offset, number = record.offset, record.number
            offset = number = 0

    def _take(self, unit: int, part: _PartEncoder, piece: int, record: Record) -> None:
        try:
            if record.error is not None:
                raise record.error
            part.add(record.text)
        except BadRecord as exc:
            if self.job.on_error == "fail":
                raise UserError(f"{self._where(unit, piece, record.number)}: {exc}") from exc
            part.writer.count_error(piece, record.number, exc.kind, str(exc))

    def _where(self, unit: int, piece: int, number: int) -> str:
        found = self.job.units[unit][piece]
        before = lines_before(found.path, [found.start])[0] if found.start else 0
        return place(found, before + number)


class _PartEncoder:
    """One part in the making: documents wait until there are enough for one call."""

    def __init__(self, encoder: UnitEncoder, unit: int, number: int) -> None:
        job = encoder.job
        self.characters = 0
        self.writer = PartWriter(
            job.folder, unit, number, encoder.dtype, hashed=job.drop_duplicates
        )
        self._job, self._encoder = job, encoder
        self._waiting: list[str] = []
        self._waiting_characters = 0
        self._head = [] if job.bos is None else [np.array([job.bos])]
        self._tail = [] if job.eod is None else [np.array([job.eod])]
        self._added_tokens = len(self._head) + len(self._tail)
        self._longest = self._unusual = ""

    def __enter__(self) -> _PartEncoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.writer.close()

    def add(self, text: Text) -> None:
        """Encode a document, soon; one that comes in pieces at once."""
        if not isinstance(text, str):
            self._flush()
            self._stream(text)
            return
        self.characters += len(text)
        self._waiting.append(text)
        self._waiting_characters += len(text)
        if self._waiting_characters >= _BATCH_CHARACTERS or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._flush()

    def finish(self, next_place: tuple[int, int, int] | None) -> None:
        """Make the part count, once samples of its hardest texts have the reference's ids."""
        self._flush()
        if self._encoder.checked is not None and not self._job.verify_all:
            samples = [excerpt(self._longest)] if self._longest else []
            samples += [excerpt(self._unusual)] if self._unusual else []
            self._encoder.checked.encode(samples)
        self.writer.finish(next_place)

    def _flush(self) -> None:
        texts, self._waiting, self._waiting_characters = self._waiting, [], 0
        rows: list[np.ndarray] = []
        lengths: list[int] = []
        hashes: list[bytes] = []
        for text, ids in zip(texts, self._encode(texts), strict=True):
            if not self._fits(len(ids)):
                continue
            rows += [*self._head, ids, *self._tail]
            lengths.append(len(ids) + self._added_tokens)
            if self._job.drop_duplicates:
                hashes.append(_new_hash(text.encode()).digest())
        self.writer.add(rows, lengths, hashes)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        for text in texts:
            if len(text) > len(self._longest):
                self._longest = text
            if not self._unusual and not text.isascii():
                self._unusual = text
        tokenizer = self._encoder.tokenizer
        if max(map(len, texts), default=0) <= CUT_CHARACTERS:
            return tokenizer.encode(texts)
        return [encode_long(tokenizer, self._encoder.splitter, text) for text in texts]

    def _stream(self, pieces: Iterator[str]) -> None:
        """Write a document bit by bit, and undo it if it turns out bad or of a wrong length."""
        mark, count, state = self.writer.mark(), 0, _new_hash()
        try:
            for ids in self._head:
                self.writer.write(ids)
            seen = self._seen(pieces, state)
            for ids in encode_pieces(self._encoder.tokenizer, self._encoder.splitter, seen):
                self.writer.write(ids)
                count += len(ids)
            for ids in self._tail:
                self.writer.write(ids)
        except BadRecord:
            self.writer.undo(mark)
            raise
        if not self._fits(count):
            self.writer.undo(mark)
            return
        hashes = [state.digest()] if self._job.drop_duplicates else []
        self.writer.add_written(count + self._added_tokens, hashes)

    def _seen(self, pieces: Iterator[str], state: hashlib.blake2b) -> Iterator[str]:
        for piece in pieces:
            self.characters += len(piece)
            if self._job.drop_duplicates:
                state.update(piece.encode())
            yield piece

    def _fits(self, tokens: int) -> bool:
        """Say whether a document of so many tokens is kept; note it if it is not."""
        job, note = self._job, self.writer.note
        note.longest = max(note.longest, tokens)
        if tokens < job.min_tokens:
            note.shorter += 1
            return False
        if job.drop_long and tokens > job.max_tokens:
            note.longer += 1
            return False
        return True


def _new_hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=HASH_BYTES)
