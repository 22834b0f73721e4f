# SPDX-License-Identifier: Apache-2.0
"""Encodes the units of a job: reads records, tokenizes them, writes parts that outlive a kill.

A long text is cut so that the ids of its stretches in a row are those of the whole. Two kinds of
tokenizers have such places. One that splits text into words first (a pre-tokenizer)
never merges across words: the text is cut between two words, and each cut is tried on the real
pre-tokenizer. One that marks word starts with U+2581 and knows a line end only as a byte never
merges across a line end: the text is cut before it, and the mark that the tokenizer puts before
every text is taken off again. Tokenizers of neither kind get long texts whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.assemble import HASH_BYTES, LISTED_ERRORS
from megatron_cream.corpus.gigatoken import GigatokenTokenizer, excerpt
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.readers import InputSpan, lines_before, place, read_span
from megatron_cream.corpus.records import BadRecord, Stretches, Text, TextRecord
from megatron_cream.corpus.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_cream.corpus.work_folder import (
    PartMetadata,
    UnitPlace,
    finished_parts,
    part_stem,
    sync_and_close,
    temporary_name,
    write_whole,
)
from megatron_cream.data.indexed import MASK_SUFFIX
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
        done = finished_parts(job.folder, unit, self.dtype)
        start = done[-1].metadata.next if done else (0, 0, 0)
        if start is None:
            self._on_bytes(job.unit_size(unit))
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
        tokenizer = self._encoder.tokenizer
        if max(map(len, texts), default=0) <= CUT_CHARACTERS:
            return tokenizer.encode(texts)
        return [encode_long(tokenizer, self._encoder.splitter, text) for text in texts]

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


CUT_CHARACTERS = 1 << 20
"""Texts longer than this are encoded in stretches of about this size."""

_SEARCHED = (1 << 11, 1 << 16)
_CONTEXT = 256
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W_])")
_BEFORE_LINE_END = re.compile(r"(?<=[^\n])(?=\n)")


@dataclass(frozen=True)
class TextSplitter:
    """Finds cuts for one tokenizer.

    Attributes:
        pattern: matches, with no width, where a cut may be.
        dropped: ids at the start of each stretch but the first that the whole does not have.
        holds: whether a cut between two stretches of text changes nothing.
    """

    pattern: re.Pattern[str]
    dropped: int
    holds: Callable[[str, str], bool]

    def last(self, text: str, start: int, end: int) -> int | None:
        """Return the last cut of ``text[start:end]``, None without one."""
        for found in reversed(list(self.pattern.finditer(text, start, end))):
            at = found.start()
            if self.holds(text[max(at - _CONTEXT, 0) : at], text[at : at + _CONTEXT]):
                return at
        return None


def find_text_splitter(tokenizer: Tokenizer) -> TextSplitter | None:
    """Return how texts may be cut for ``tokenizer``, None if they may not."""
    tokenizer = getattr(tokenizer, "reference", tokenizer)  # of a fast one
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _line_splitter(tokenizer, tokenizer.pieces)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return TextSplitter(re.compile(""), 0, lambda left, right: True)
    description = tokenizer.description
    if description["model"].get("type") != "BPE" or not _plain_added_tokens(description):
        return None
    if description.get("pre_tokenizer") is None:
        return _line_splitter(tokenizer, list(description["model"]["vocab"]))
    normalizer = description.get("normalizer")
    if normalizer is not None and normalizer.get("type") not in ("NFC", "NFKC"):
        return None
    return TextSplitter(
        _BETWEEN_WORDS, 0, lambda left, right: _between_words(tokenizer, left, right)
    )


def encode_pieces(
    tokenizer: Tokenizer, splitter: TextSplitter | None, pieces: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yield the ids of a text that comes in pieces, cut anywhere, ``[tokens]`` at a time."""
    first = True
    for stretch in _cut_anew(splitter, pieces):
        (ids,) = tokenizer.encode([stretch])
        yield ids if first or splitter is None else ids[splitter.dropped :]
        first = False


def encode_long(tokenizer: Tokenizer, splitter: TextSplitter | None, text: str) -> np.ndarray:
    """Return the ids of a text, encoded in stretches where it is long."""
    starts = range(0, len(text), CUT_CHARACTERS)
    pieces = (text[start : start + CUT_CHARACTERS] for start in starts)
    return np.concatenate(list(encode_pieces(tokenizer, splitter, pieces)))


def _cut_anew(splitter: TextSplitter | None, pieces: Iterable[str]) -> Iterator[str]:
    """Cut a text of many pieces anew, where ``splitter`` says."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if splitter is None or size < CUT_CHARACTERS:
            continue
        text = "".join(waiting)
        tries = (splitter.last(text, max(size - far, 1), size - _CONTEXT) for far in _SEARCHED)
        at = next(filter(None, tries), None)
        if at is None:
            waiting = [text]
            continue
        yield text[:at]
        waiting, size = [text[at:]], size - at
    yield "".join(waiting)


def _plain_added_tokens(description: dict[str, Any]) -> bool:
    """Say whether no added token can reach across a cut."""
    for token in description.get("added_tokens") or []:
        content = token["content"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            return False
        if "\n" in content or content == " " or (" " in content and content.strip()):
            return False
    return True


def _between_words(tokenizer: HuggingFaceTokenizer, left: str, right: str) -> bool:
    whole = tokenizer.words(left + right)
    before, after = tokenizer.words(left), tokenizer.words(right)
    return whole == before + after


def _line_splitter(tokenizer: Tokenizer, pieces: list[str]) -> TextSplitter | None:
    if any("\n" in piece for piece in pieces):
        return None
    line_end, twice, spaced, plain = (
        ids.tolist() for ids in tokenizer.encode(["\n", "\n\n", "a  b ", "a b"])
    )
    # Of a line end: the mark, then one byte. Spaces must not be removed either.
    if len(line_end) != 2 or twice != [*line_end, line_end[1]]:
        return None
    if len(spaced) <= len(plain):
        return None
    return TextSplitter(_BEFORE_LINE_END, 1, lambda left, right: True)
