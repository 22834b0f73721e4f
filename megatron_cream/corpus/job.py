# SPDX-License-Identifier: Apache-2.0
"""Plans a preprocessing job from its settings.

A job reads files. It is cut into *units* of work, each some *spans* of files, by bytes of input and
never by workers or shards. A unit is written as one or several *parts*, in a row the dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream import ownership
from megatron_cream.corpus.gigatoken import GigatokenTokenizer
from megatron_cream.corpus.input_files import (
    ARROW,
    JSONL,
    PARQUET,
    STDIN,
    TextInputs,
    find_inputs,
    format_of,
    is_compressed,
)
from megatron_cream.corpus.readers import InputSpan
from megatron_cream.corpus.records import Fields
from megatron_cream.corpus.settings import PreprocessConfig
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.corpus.work_folder import SUFFIXES, validate_prefix
from megatron_cream.data.indexed import token_dtype
from megatron_cream.errors import UserError

_MOST_PARTS = 1_000_000


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
    """What decides the bytes of a dataset, and how they are made; sent to every worker.

    Attributes:
        config: the settings.
        prefix: path of the output, that of the shard where there are several.
        files: the input.
        units: the spans of each unit of work, all shards together.
        tokenizer_digest: names the content of the tokenizer, wherever its files are.
        vocab_size, eod_id, bos_id: of the tokenizer.
        fast: whether the fast tokenizer encodes it.
    """

    config: PreprocessConfig
    prefix: str
    files: tuple[InputFile, ...]
    units: tuple[tuple[InputSpan, ...], ...]
    tokenizer_digest: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    fast: bool = False

    @property
    def fields(self) -> Fields:
        """Which keys or columns hold the text."""
        keys = self.config.json_key
        names = (keys,) if isinstance(keys, str) else tuple(keys)
        return Fields(names, self.config.key_separator, self.config.mask_key)

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return token_dtype(self.vocab_size)

    @property
    def eod(self) -> int | None:
        """The token after each document."""
        return self.eod_id if self.config.append_eod else None

    @property
    def bos(self) -> int | None:
        """The token before each document."""
        return self.bos_id if self.config.prepend_bos else None

    @property
    def folder(self) -> Path:
        """Where finished parts are kept until the dataset is."""
        return Path(self.prefix + ".parts")

    @property
    def reads_stdin(self) -> bool:
        """Whether standard input, which cannot be read a second time, is among the files."""
        return any(file.path == str(STDIN) for file in self.files)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of all shards together."""
        config, fields = self.config, asdict(self.fields)
        if fields["mask"] is None:  # as before there were masks, so that finished jobs are known
            del fields["mask"]
        return {
            "input": [asdict(file) for file in self.files],
            "fields": fields,
            "tokenizer": [config.tokenizer_type, self.tokenizer_digest],
            "eod": self.eod,
            "bos": self.bos,
            "dtype": self.dtype.name,
            "min_tokens": config.min_tokens,
            "max_tokens": config.max_tokens,
            "drop_long": config.drops_long,
            "drop_duplicates": config.drop_duplicates,
            "part_bytes": config.part_bytes,
        }

    def identity_of_shard(self) -> dict[str, Any]:
        """Everything that decides the bytes of this shard's parts."""
        return {**self.identity(), "shard": self.config.shard}

    def metadata(self) -> dict[str, Any]:
        """What ``PREFIX.json`` says of tokenizer and limits."""
        config = self.config
        return {
            "tokenizer_type": config.tokenizer_type,
            "tokenizer_model": config.tokenizer_model,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "bos_id": self.bos_id,
            "appended_eod": config.append_eod,
            "prepended_bos": config.prepend_bos,
            "min_tokens": config.min_tokens,
            "max_tokens": config.max_tokens,
            "dtype": self.dtype.name,
        }

    def digest(self) -> str:
        """A name for ``identity``, the same for all shards of a job."""
        return _digest(self.identity())

    def fingerprint(self) -> str | None:
        """A name for everything that decides a dataset and its metadata; None for standard input.

        Neither the parts that a job was cut into nor its shards change what comes out of it.
        """
        if self.reads_stdin:
            return None
        decides = self.identity()
        del decides["part_bytes"]
        more = {"on_error": self.config.on_error, "counted": self.config.thresholds}
        return _digest(decides | more)

    def own_units(self) -> list[int]:
        """The units of this shard: a stretch of all, with its share of the bytes."""
        index, count = self.config.shard
        sizes = list(map(self.unit_size, range(len(self.units))))
        total = max(sum(sizes), 1)
        own, before = [], 0
        for unit, size in enumerate(sizes):
            if before * count // total == index:
                own.append(unit)
            before += size
        return own

    def unit_size(self, unit: int) -> int:
        """Bytes on disk that a unit reads."""
        return sum(
            self._sizes[span.path] if span.end is None else span.end - span.start
            for span in self.units[unit]
        )

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that encodes this job, the fast one where it is to be."""
        reference = load_tokenizer(self.config.tokenizer_type, self.config.tokenizer_model)
        return GigatokenTokenizer(reference, self.config.verify < 0) if self.fast else reference

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {file.path: file.size for file in self.files}


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan_job(config: PreprocessConfig) -> tuple[PreprocessJob, Tokenizer, TextInputs]:
    """Return the job that the settings ask for, its tokenizer and what it reads.

    Raises:
        UserError: a setting that cannot work.
        FileNotFoundError: an input, a model or a folder that is not there.
    """
    config.validate()
    index, count = config.shard
    prefix = config.output_prefix + (f"-{index:05d}-of-{count:05d}" if count > 1 else "")
    validate_prefix(prefix)
    tokenizer = load_tokenizer(config.tokenizer_type, config.tokenizer_model)
    _validate_special_tokens(config, tokenizer)
    if config.tokenizer_model is not None:
        where = f"--output-prefix {prefix}"
        ownership.validate_outside(config.tokenizer_model, Path(prefix + ".parts"), where)
    inputs = find_inputs(config.input)
    _validate_part_bytes(config, inputs.total_bytes)
    files = tuple(_look_at(path, config, prefix) for path in inputs.files)
    content = getattr(tokenizer, "serialized", b"")
    content += json.dumps([tokenizer.name, tokenizer.eod, tokenizer.bos]).encode()
    job = PreprocessJob(
        config=config,
        prefix=prefix,
        files=files,
        units=_cut_into_units(files, config.part_bytes),
        tokenizer_digest=hashlib.blake2b(content, digest_size=16).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        bos_id=tokenizer.bos,
    )
    for file in files:
        if config.mask_key is not None and file.format != JSONL:
            raise UserError(
                f"--mask-key {config.mask_key}: {file.path} is {file.format}, needs jsonl"
            )
        if file.format in (PARQUET, ARROW):
            from megatron_cream.corpus.columnar import validate_columns

            validate_columns(file.path, file.format, job.fields)
    return job, tokenizer, inputs


def _validate_special_tokens(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    wanted = (
        ("--append-eod", config.append_eod, "an end of document", tokenizer.eod),
        ("--prepend-bos", config.prepend_bos, "a beginning of sequence", tokenizer.bos),
    )
    for flag, asked, kind, token in wanted:
        if asked and token is None:
            model = config.tokenizer_model or tokenizer.name
            raise UserError(f"{flag}: {model} has none, needs a tokenizer with {kind} token")


def _validate_part_bytes(config: PreprocessConfig, total_bytes: int) -> None:
    """Check that parts are not so small that their files would be too many for a folder."""
    if total_bytes // config.part_bytes > _MOST_PARTS:
        raise UserError(
            f"--part-bytes {config.part_bytes}: cuts the input into more than {_MOST_PARTS} parts, "
            f"needs {-(-total_bytes // _MOST_PARTS)} or more"
        )


def _look_at(path: Path, config: PreprocessConfig, prefix: str) -> InputFile:
    """Return what an input is, once it is sure that the job will not write over it."""
    if path != STDIN:
        where = f"--output-prefix {prefix}"
        if os.path.realpath(path) in {os.path.realpath(prefix + suffix) for suffix in SUFFIXES}:
            raise UserError(f"{where}: {path} is an input, needs another prefix")
        ownership.validate_outside(path, Path(prefix + ".parts"), where)
    return InputFile.of(path, format_of(path, config.input_format))


def _cut_into_units(
    files: tuple[InputFile, ...], part_bytes: int
) -> tuple[tuple[InputSpan, ...], ...]:
    """Return units of at most ``part_bytes``, but for files that are read in one go.

    Plain JSONL is cut at multiples of ``part_bytes``; a line belongs to where it begins.
    """
    units: list[tuple[InputSpan, ...]] = []
    waiting: list[InputSpan] = []
    room = part_bytes
    for file in files:
        for span, size in _cut_file(file, part_bytes):
            if waiting and size > room:
                units.append(tuple(waiting))
                waiting, room = [], part_bytes
            waiting.append(span)
            room -= size
    return (*units, tuple(waiting)) if waiting else tuple(units)


def _cut_file(file: InputFile, part_bytes: int) -> Iterator[tuple[InputSpan, int]]:
    path = Path(file.path)
    if file.format != JSONL or is_compressed(path) or path == STDIN:
        yield InputSpan(file.path, file.format), file.size
        return
    for start in range(0, max(file.size, 1), part_bytes):
        end = min(start + part_bytes, file.size)
        yield InputSpan(file.path, file.format, start, end), end - start
