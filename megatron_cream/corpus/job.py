# SPDX-License-Identifier: Apache-2.0
"""A preprocessing job, and its units of work: cut by bytes of input, never by workers or shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cream.corpus.gigatoken import GigatokenSource, GigatokenTokenizer
from megatron_cream.corpus.jsonl import Fields
from megatron_cream.corpus.readers import JSONL, STDIN, InputSpan, is_compressed
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer

PART_BYTES = 64 << 20
"""Text that one part of the work covers: what a killed job does again, at most, per worker."""


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the job was planned; one that changes since is an error."""

    path: str
    format: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path, format: str) -> InputFile:
        """Look at a file; standard input has no size."""
        if path == STDIN:
            return cls(str(path), format, 0, 0)
        status = path.stat()
        return cls(str(path), format, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class PreprocessJob:
    """What decides the bytes of the dataset, and how they are made; sent to every worker.

    Attributes:
        prefix: the output; parts are kept in the folder ``PREFIX.parts``.
        files: the input.
        units: the pieces of each unit of work, all shards together.
        fields: which keys or columns hold the text.
        tokenizer: type and model.
        vocab_size, eod_id, bos_id: of the tokenizer.
        append_eod, prepend_bos: whether those are added to each document.
        dtype: of the tokens.
        min_tokens, max_tokens: limits of a document, before eod and bos.
        drop_long: whether documents over ``max_tokens`` are dropped in place of split.
        drop_duplicates: whether exact copies of earlier documents are dropped.
        shard: which of how many this job is.
        part_bytes: text per part.
        on_error: ``fail`` or ``skip``.
        fast: the fast tokenizer, None for the reference.
        verify_all: whether every document is encoded by both.
    """

    prefix: str
    files: tuple[InputFile, ...]
    units: tuple[tuple[InputSpan, ...], ...]
    fields: Fields
    tokenizer: tuple[str, str | None]
    tokenizer_digest: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    append_eod: bool
    prepend_bos: bool
    dtype: str
    min_tokens: int
    max_tokens: int | None
    drop_long: bool
    drop_duplicates: bool
    shard: tuple[int, int]
    part_bytes: int
    on_error: str
    fast: GigatokenSource | None
    verify_all: bool

    @property
    def eod(self) -> int | None:
        """The token after each document."""
        return self.eod_id if self.append_eod else None

    @property
    def bos(self) -> int | None:
        """The token before each document."""
        return self.bos_id if self.prepend_bos else None

    @property
    def max_split(self) -> int | None:
        """Tokens after which a document is split; None where it is not."""
        return None if self.drop_long else self.max_tokens

    @property
    def folder(self) -> Path:
        """Where finished parts are kept until the dataset is."""
        return Path(self.prefix + ".parts")

    def settings(self) -> dict[str, Any]:
        """Everything that decides the bytes of all shards together."""
        return {
            "input": [asdict(file) for file in self.files],
            "fields": asdict(self.fields),
            "tokenizer": [self.tokenizer[0], self.tokenizer_digest],
            "eod": self.eod,
            "bos": self.bos,
            "dtype": self.dtype,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "drop_long": self.drop_long,
            "drop_duplicates": self.drop_duplicates,
            "part_bytes": self.part_bytes,
        }

    def digest(self) -> str:
        """A name for ``settings``, the same for all shards of a job."""
        return _digest(self.settings())

    def fingerprint(self, counted: tuple[int, ...]) -> str | None:
        """A name for everything that decides a dataset and its note; None where nothing does.

        Args:
            counted: lengths that the documents are compared with.
        """
        if any(file.path == str(STDIN) for file in self.files):
            return None
        settings = self.settings() | {"on_error": self.on_error, "counted": counted}
        # Neither the parts a job was cut into nor its shards change what comes out of it.
        return _digest({name: settings[name] for name in settings if name != "part_bytes"})

    def own_units(self) -> list[int]:
        """The units of this shard: a stretch of all, with its share of the bytes."""
        index, count = self.shard
        sizes = [sum(map(self._piece_size, unit)) for unit in self.units]
        total = max(sum(sizes), 1)
        own, before = [], 0
        for unit, size in enumerate(sizes):
            if before * count // total == index:
                own.append(unit)
            before += size
        return own

    def unit_size(self, unit: int) -> int:
        """Bytes on disk that a unit reads."""
        return sum(map(self._piece_size, self.units[unit]))

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that encodes this job, fast where it is to be."""
        if self.fast is None:
            return load_tokenizer(*self.tokenizer)
        return GigatokenTokenizer(self.fast, lambda: load_tokenizer(*self.tokenizer))

    def _piece_size(self, piece: InputSpan) -> int:
        if piece.end is not None:
            return piece.end - piece.start
        return self._sizes[piece.path]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {file.path: file.size for file in self.files}


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan_units(files: tuple[InputFile, ...], part_bytes: int) -> tuple[tuple[InputSpan, ...], ...]:
    """Cut the input into units of at most ``part_bytes``, but for files that are read in one go.

    Plain JSONL is cut at multiples of ``part_bytes``; a line belongs to where it begins.
    """
    units: list[tuple[InputSpan, ...]] = []
    waiting: list[InputSpan] = []
    room = part_bytes
    for file in files:
        for piece, size in _pieces(file, part_bytes):
            if waiting and size > room:
                units.append(tuple(waiting))
                waiting, room = [], part_bytes
            waiting.append(piece)
            room -= size
    return (*units, tuple(waiting)) if waiting else tuple(units)


def _pieces(file: InputFile, part_bytes: int) -> list[tuple[InputSpan, int]]:
    path = Path(file.path)
    if file.format != JSONL or is_compressed(path) or path == STDIN:
        return [(InputSpan(file.path, file.format), file.size)]
    ends = [*range(part_bytes, file.size, part_bytes), file.size]
    return [
        (InputSpan(file.path, file.format, start, end), end - start)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
