# SPDX-License-Identifier: Apache-2.0
"""The settings of ``preprocess``, some shared with other commands, and the job that they make.

A job reads files. It is cut into *units* of work, each some *spans* of files, by bytes of input and
never by workers or shards. A unit is written as one or several *parts*, in a row the dataset.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream import ownership
from megatron_cream.corpus.fast_encoder import ENGINES, GigatokenTokenizer
from megatron_cream.corpus.input_files import (
    FORMATS,
    JSONL,
    STDIN,
    InputFile,
    InputSpan,
    TextInputs,
    cut_into_units,
    find_inputs,
)
from megatron_cream.corpus.inspection import COUNTED_KEYS, FINGERPRINT
from megatron_cream.corpus.optional_formats import ARROW, PARQUET, validate_columns
from megatron_cream.corpus.readers import Fields
from megatron_cream.corpus.storage import SUFFIXES
from megatron_cream.corpus.tokenizers import TOKENIZERS, Tokenizer, digest, load_tokenizer
from megatron_cream.data.indexed import MOST_SHARDS, DatasetFiles, token_dtype
from megatron_cream.errors import UserError
from megatron_cream.options import flag_field, validate_count, validate_fields


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}, needs I/N as 0/8")
    return int(index), int(count)


_input, _tokens, _documents, _running = (
    partial(flag_field, group=group) for group in ("input", "tokens", "documents", "running")
)
TOKENIZER_TYPE: dict[str, Any] = {"help": "how text becomes ids", "choices": tuple(TOKENIZERS)}
TOKENIZER_MODEL: dict[str, Any] = {
    "help": "tokenizer.json, its folder, or a .model file (default: none, for plain bytes)",
    "default": None,
    "metavar": "PATH",
}
APPEND_EOD: dict[str, Any] = {"help": "end each document with the eod token", "default": False}
ENGINE: dict[str, Any] = {
    "help": "auto takes gigatoken where exact",
    "default": "auto",
    "choices": ENGINES,
}
WORKERS: dict[str, Any] = {"help": "processes", "default": 1, "most": 4096, "metavar": "W"}
OUTPUT_PREFIX: dict[str, Any] = {"help": "writes PREFIX.bin .idx .json", "metavar": "PREFIX"}
OVERWRITE: dict[str, Any] = {"help": "replace the files of an earlier run", "default": False}
_SHARE = "report the share of documents as long (default: not reported)"


@dataclass(frozen=True)
class PreprocessConfig:
    """The settings of `preprocess`; each is a flag of ``megatron-cream preprocess``.

    Attributes:
        input: files, folders and patterns of text; ``-`` is standard input.
        tokenizer_type: ``HuggingFaceTokenizer``, ``SentencePieceTokenizer`` or
            ``ByteLevelTokenizer``.
        output_prefix: path of the dataset without suffix.
        tokenizer_model: path of the tokenizer's file or folder.
        json_key: keys or columns that hold the text.
        key_separator: put between the texts of several keys.
        mask_key: key of the stretches of the text that are trained, pairs of characters as
            ``[[0, 5], [9, 12]]``; makes ``PREFIX.mask``. None trains all.
        input_format: ``jsonl``, ``text``, ``parquet`` or ``arrow``; None for what suffixes say.
        append_eod, prepend_bos: whether those tokens are put around each document.
        min_tokens, max_tokens: tokens of a document, before eod and bos.
        long_documents: ``split`` or ``drop`` documents over ``max_tokens``.
        drop_duplicates: whether exact copies of earlier documents are dropped.
        on_error: ``fail`` at a bad record, or ``skip`` it.
        seq_length, target_length: tokens; the share of documents as long is reported.
        engine: ``auto``, ``fast`` (gigatoken) or ``reference``.
        verify: documents to compare the fast tokenizer with the reference on; -1 for all.
        workers: processes.
        shard: which shard, from 0, of how many.
        ray: address of a Ray cluster; None for this machine.
        overwrite: whether the files of an earlier dataset are replaced.
        restart: whether the parts of an unfinished job are discarded.
        part_bytes: bytes of text per part: what a killed job does again, at most, per worker.
            Never changes the result.
    """

    input: tuple[str, ...] = _input("files, folders, globs, or -", many=True, metavar="PATH")
    tokenizer_type: str = _tokens(**TOKENIZER_TYPE)
    output_prefix: str = _running(**OUTPUT_PREFIX)
    tokenizer_model: str | None = _tokens(**TOKENIZER_MODEL)
    input_format: str | None = _input(
        "of all files (default: by their suffixes)", default=None, choices=FORMATS
    )
    json_key: str | tuple[str, ...] = _input(
        "of the text (default: text)", default=("text",), many=True, metavar="KEY"
    )
    key_separator: str = _input(
        "between several keys' texts (default: an empty line)", default="\n\n", metavar="TEXT"
    )
    mask_key: str | None = _input(
        "of the stretches of the text that are trained (default: all of it)",
        default=None,
        metavar="KEY",
    )
    on_error: str = _input("at a bad record", default="fail", choices=("fail", "skip"))
    append_eod: bool = _tokens(**APPEND_EOD)
    prepend_bos: bool = _tokens("begin each document with the bos token", default=False)
    engine: str = _tokens(**ENGINE)
    verify: int = _tokens("documents to compare gigatoken on", default=8, fewest=-1, metavar="N")
    min_tokens: int = _documents("drop shorter documents", default=1, metavar="N")
    max_tokens: int | None = _documents(
        "split longer documents (default: no limit)", default=None, type=int, metavar="N"
    )
    long_documents: str = _documents(
        "over --max-tokens", default="split", choices=("split", "drop")
    )
    drop_duplicates: bool = _documents("keep the first of equal documents", default=False)
    seq_length: int | None = _documents(_SHARE, default=None, type=int, metavar="N")
    target_length: int | None = _documents(_SHARE, default=None, type=int, metavar="T")
    workers: int = _running(**WORKERS)
    shard: tuple[int, int] = _running(
        "part I of N (default: 0/1)", default=(0, 1), type=_parse_shard, metavar="I/N"
    )
    ray: str | None = _running(
        "run on a Ray cluster: auto, local, ray://host:port (default: on this machine)",
        default=None,
        metavar="ADDRESS",
    )
    overwrite: bool = _running(**OVERWRITE)
    restart: bool = _running("forget what an unfinished job has done", default=False)
    part_bytes: int = _running(
        "text per part of the work, which never changes the result",
        default=64 << 20,
        most=1 << 40,
        metavar="BYTES",
    )

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Lengths to count documents of."""
        return tuple(n for n in (self.seq_length, self.target_length) if n is not None)

    @property
    def drops_long(self) -> bool:
        """Whether documents over ``max_tokens`` are dropped, in place of split."""
        return self.long_documents == "drop"

    def validate(self) -> None:
        """Check the settings, whatever the input is.

        Raises:
            UserError: naming the flag, the value and what it needs.
        """
        validate_fields(self)
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UserError(
                f"--max-tokens {self.max_tokens}: needs at least --min-tokens, {self.min_tokens}"
            )
        if self.drops_long and self.max_tokens is None:
            raise UserError("--long-documents drop: needs --max-tokens")
        index, count = self.shard
        validate_count(f"--shard {index}/{count}: a count of", count, fewest=1, most=MOST_SHARDS)
        if not 0 <= index < count:
            raise UserError(f"--shard {index}/{count}: needs 0/{count} to {count - 1}/{count}")
        if not self.json_key:
            raise UserError("--json-key: needs at least one name")
        if self.mask_key is not None and self.engine == "fast":
            raise UserError(
                "--engine fast: does not say where in a text its tokens stand, which --mask-key "
                "needs; leave one out"
            )
        if str(STDIN) not in self.input:
            return
        if self.workers > 1 or self.ray is not None or count > 1:
            raise UserError(
                "--input -: standard input is read by one process, needs --workers 1 without "
                "--shard and --ray"
            )
        if self.input_format in (PARQUET, ARROW):
            raise UserError(f"--input -: cannot be {self.input_format}, needs jsonl or text")


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

    def own_units(self) -> dict[int, int]:
        """The units of this shard, a stretch of all, and the bytes on disk that each reads."""
        index, count = self.config.shard
        sizes = [sum(span.size for span in unit) for unit in self.units]
        total = max(sum(sizes), 1)
        own, before = {}, 0
        for unit, size in enumerate(sizes):
            if before * count // total == index:
                own[unit] = size
            before += size
        return own

    def is_made(self) -> bool:
        """Return whether the files at ``prefix`` are what this job makes: all there, and whole."""
        wanted = self.fingerprint()
        try:
            found = DatasetFiles.open(self.prefix, empty=True).metadata or {}
        except (UserError, FileNotFoundError):
            return False
        if wanted is None or found.get(FINGERPRINT) != wanted or not set(found) >= COUNTED_KEYS:
            return False
        return tuple(found.get("shard", (0, 1))) == self.config.shard

    def describe_added_tokens(self, tokenizer: Tokenizer) -> str:
        """Say what is put around a document: a model is trained with one rule or the other."""
        head = "no bos" if self.bos is None else f"bos {self.bos}"
        tail = "no eod" if self.eod is None else f"eod {self.eod}"
        wanted = getattr(tokenizer, "template", "")
        note = f"; the tokenizer's own template is {wanted}" if wanted else ""
        if self.bos is None and getattr(tokenizer, "begins_with_bos", False):
            note += ", as the model was trained: --prepend-bos does as it does"
        return f"each document: {head}, its tokens, {tail}{note}"

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that encodes this job, the fast one where it is to be."""
        reference = load_tokenizer(self.config.tokenizer_type, self.config.tokenizer_model)
        return GigatokenTokenizer(reference, self.config.verify < 0) if self.fast else reference


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
    tokenizer = load_tokenizer(
        config.tokenizer_type, config.tokenizer_model, config.append_eod, config.prepend_bos
    )
    inputs = find_inputs(config.input)
    files = inputs.described(config.input_format)
    index, count = config.shard
    job = PreprocessJob(
        config=config,
        prefix=config.output_prefix + (f"-{index:05d}-of-{count:05d}" if count > 1 else ""),
        files=files,
        units=cut_into_units(files, config.part_bytes),
        tokenizer_digest=digest(tokenizer),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        bos_id=tokenizer.bos,
    )
    _validate_files(job)
    return job, tokenizer, inputs


def _validate_files(job: PreprocessJob) -> None:
    """Check that the job can be written, reads what it says, and not what it writes over."""
    config, where = job.config, f"--output-prefix {job.prefix}"
    ownership.validate_prefix(job.prefix)
    outputs = {os.path.realpath(job.prefix + suffix) for suffix in SUFFIXES}
    for path in (*(file.path for file in job.files), config.tokenizer_model):
        if path is None or path == str(STDIN):
            continue
        if os.path.realpath(path) in outputs:
            raise UserError(f"{where}: {path} is an input, needs another prefix")
        ownership.validate_outside(path, job.folder, where)
    for file in job.files:
        if config.mask_key is not None and file.format != JSONL:
            raise UserError(
                f"--mask-key {config.mask_key}: {file.path} is {file.format}, needs jsonl"
            )
        if file.format in (PARQUET, ARROW):
            validate_columns(file.path, file.format, job.fields.names)
