# SPDX-License-Identifier: Apache-2.0
"""The settings of a preprocessing job, checked before any text is read."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream import ownership
from megatron_cream.corpus.engine import ENGINES
from megatron_cream.corpus.job import PART_BYTES, InputFile, PreprocessJob, plan_units
from megatron_cream.corpus.jsonl import Fields
from megatron_cream.corpus.readers import (
    ARROW,
    FORMATS,
    PARQUET,
    STDIN,
    TextInputs,
    find_inputs,
    format_of,
)
from megatron_cream.corpus.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from megatron_cream.corpus.work_folder import SUFFIXES, validate_prefix
from megatron_cream.data.indexed import MOST_SHARDS, token_dtype
from megatron_cream.errors import UserError


@dataclass(frozen=True)
class PreprocessConfig:
    """A job; the fields are the flags of `megatron-cream preprocess`.

    Attributes:
        verify: documents to compare the fast tokenizer with the reference on; -1 for all.
        shard: which shard, from 0, of how many.
        part_bytes: text per part; never changes the result.
    """

    input: tuple[str, ...]
    tokenizer_type: str
    output_prefix: str
    tokenizer_model: str | None = None
    json_key: str | tuple[str, ...] = "text"
    key_separator: str = "\n\n"
    input_format: str | None = None
    append_eod: bool = False
    prepend_bos: bool = False
    min_tokens: int = 1
    max_tokens: int | None = None
    long_documents: str = "split"
    drop_duplicates: bool = False
    on_error: str = "fail"
    seq_length: int | None = None
    target_length: int | None = None
    engine: str = "auto"
    verify: int = 8
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    ray: str | None = None
    overwrite: bool = False
    restart: bool = False
    part_bytes: int = PART_BYTES

    def fields(self) -> Fields:
        """Which keys hold the text."""
        names = (self.json_key,) if isinstance(self.json_key, str) else tuple(self.json_key)
        return Fields(names, self.key_separator)

    def thresholds(self) -> tuple[int, ...]:
        """Lengths to count documents of."""
        return tuple(n for n in (self.seq_length, self.target_length) if n is not None)

    def noted(self, job: PreprocessJob) -> dict[str, Any]:
        """What ``PREFIX.json`` says of tokenizer and limits."""
        return {
            "tokenizer_type": self.tokenizer_type,
            "tokenizer_model": self.tokenizer_model,
            "vocab_size": job.vocab_size,
            "eod_id": job.eod_id,
            "bos_id": job.bos_id,
            "appended_eod": self.append_eod,
            "prepended_bos": self.prepend_bos,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "dtype": job.dtype,
        }


def output_prefix(config: PreprocessConfig) -> str:
    """Return where a job writes: shards have a prefix of their own."""
    index, count = config.shard
    return config.output_prefix + (f"-{index:05d}-of-{count:05d}" if count > 1 else "")


def plan_job(config: PreprocessConfig) -> tuple[PreprocessJob, Tokenizer, TextInputs]:
    """Return the job that the settings ask for.

    Raises:
        UserError: a setting that cannot work.
        FileNotFoundError: an input, a model or a folder that is not there.
    """
    validate_settings(config)
    prefix = output_prefix(config)
    validate_prefix(prefix)
    tokenizer = load_tokenizer(config.tokenizer_type, config.tokenizer_model)
    _validate_special_tokens(config, tokenizer)
    if config.tokenizer_model is not None:
        where = f"--output-prefix {prefix}"
        ownership.validate_outside(config.tokenizer_model, Path(prefix + ".parts"), where)
    inputs = find_inputs(config.input)
    targets = {os.path.realpath(prefix + suffix) for suffix in SUFFIXES}
    files = []
    for path in inputs.files:
        if path == STDIN:
            files.append(InputFile.of(path, _validated_format(config, path)))
            continue
        if os.path.realpath(path) in targets:
            raise UserError(f"--output-prefix {prefix}: {path} is an input, needs another prefix")
        ownership.validate_outside(path, Path(prefix + ".parts"), f"--output-prefix {prefix}")
        files.append(InputFile.of(path, _validated_format(config, path)))
    validate_part_bytes(config, sum(file.size for file in files))
    job = PreprocessJob(
        prefix=prefix,
        files=tuple(files),
        units=plan_units(tuple(files), config.part_bytes),
        fields=config.fields(),
        tokenizer=(config.tokenizer_type, config.tokenizer_model),
        tokenizer_digest=_digest(config, tokenizer),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        bos_id=tokenizer.bos,
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        dtype=token_dtype(tokenizer.vocab_size).name,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        drop_long=config.long_documents == "drop",
        drop_duplicates=config.drop_duplicates,
        shard=config.shard,
        part_bytes=config.part_bytes,
        on_error=config.on_error,
        fast=None,
        verify_all=config.verify < 0,
    )
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


def _validated_format(config: PreprocessConfig, path: Path) -> str:
    found = format_of(path, config.input_format)
    if found in (PARQUET, ARROW):
        from megatron_cream.corpus.columnar import validate_columns

        validate_columns(str(path), found, config.fields())
    return found


def _digest(config: PreprocessConfig, tokenizer: Tokenizer) -> str:
    """A name for the content of the tokenizer, wherever its files are."""
    state = hashlib.blake2b(digest_size=16)
    if hasattr(tokenizer, "serialized"):
        state.update(tokenizer.serialized)
    state.update(json.dumps([tokenizer.name, tokenizer.eod, tokenizer.bos]).encode())
    return state.hexdigest()


LARGEST_COUNT = (1 << 31) - 3
"""Tokens of a sequence, at most: with bos and eod, what an index has room for."""

_MOST_WORKERS = 4096
_LARGEST_PART = 1 << 40
_MOST_PARTS = 1_000_000


def validate_settings(config: PreprocessConfig) -> None:
    """Refuse a setting that cannot work, whatever the input is.

    Raises:
        UserError: naming the flag, the value and what it needs.
    """
    validate_count("--workers", config.workers, fewest=1, most=_MOST_WORKERS)
    validate_count("--min-tokens", config.min_tokens, fewest=1)
    validate_count("--max-tokens", config.max_tokens, fewest=1)
    validate_count("--seq-length", config.seq_length, fewest=1)
    validate_count("--target-length", config.target_length, fewest=1)
    validate_count("--part-bytes", config.part_bytes, fewest=1, most=_LARGEST_PART)
    validate_count("--verify", config.verify, fewest=-1)
    _validate_choices(config)
    if config.max_tokens is not None and config.max_tokens < config.min_tokens:
        raise UserError(
            f"--max-tokens {config.max_tokens}: needs at least --min-tokens, {config.min_tokens}"
        )
    if config.long_documents == "drop" and config.max_tokens is None:
        raise UserError("--long-documents drop: needs --max-tokens")
    index, count = config.shard
    validate_count(f"--shard {index}/{count}: a count of", count, fewest=1, most=MOST_SHARDS)
    if not 0 <= index < count:
        raise UserError(f"--shard {index}/{count}: needs 0/{count} to {count - 1}/{count}")
    if not config.fields().names:
        raise UserError("--json-key: needs at least one name")
    _validate_standard_input(config)
    if config.ray is not None:
        from megatron_cream.corpus.executors import import_ray

        import_ray()


def validate_count(flag: str, value: int | None, fewest: int, most: int = LARGEST_COUNT) -> None:
    """Refuse a number outside ``fewest`` to ``most``; None is a flag that is not given."""
    if value is not None and not fewest <= value <= most:
        raise UserError(f"{flag} {value}: needs {fewest} to {most}")


def validate_part_bytes(config: PreprocessConfig, total_bytes: int) -> None:
    """Refuse parts so small that their files would be too many for a folder."""
    if total_bytes // config.part_bytes > _MOST_PARTS:
        raise UserError(
            f"--part-bytes {config.part_bytes}: cuts the input into more than {_MOST_PARTS} parts, "
            f"needs {-(-total_bytes // _MOST_PARTS)} or more"
        )


def _validate_choices(config: PreprocessConfig) -> None:
    choices = (
        ("--long-documents", config.long_documents, ("split", "drop")),
        ("--on-error", config.on_error, ("fail", "skip")),
        ("--engine", config.engine, ENGINES),
        ("--input-format", config.input_format, (None, *FORMATS)),
    )
    for flag, value, allowed in choices:
        if value not in allowed:
            names = ", ".join(name for name in allowed if name)
            raise UserError(f"{flag} {value}: needs one of {names}")


def _validate_standard_input(config: PreprocessConfig) -> None:
    if str(STDIN) not in config.input:
        return
    if config.workers > 1 or config.ray is not None or config.shard[1] > 1:
        raise UserError(
            "--input -: standard input is read by one process, needs --workers 1 without --shard "
            "and --ray"
        )
    if config.input_format in (PARQUET, ARROW):
        raise UserError(f"--input -: cannot be {config.input_format}, needs jsonl or text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a job."""
    _add_input(parser.add_argument_group("input"))
    _add_tokens(parser.add_argument_group("tokens"))
    _add_documents(parser.add_argument_group("documents"))
    _add_running(parser.add_argument_group("running"))


def config_from(args: argparse.Namespace) -> PreprocessConfig:
    """Return the job that the flags ask for."""
    flags = dict(vars(args))
    flags["verify"] = -1 if flags.pop("verify_all") else flags["verify"]
    for name in ("input", "json_key"):
        flags[name] = tuple(flags[name])
    return PreprocessConfig(**flags)


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, or -")
    add("--input-format", choices=FORMATS, help="of all files (default: by their suffixes)")
    add(
        "--json-key", nargs="+", default=["text"], metavar="KEY", help="of the text (default: text)"
    )
    join = "between several keys' texts (default: an empty line)"
    add("--key-separator", default="\n\n", metavar="TEXT", help=join)
    add("--on-error", choices=("fail", "skip"), default="fail", help="at a bad record")


def _add_tokens(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    model = "tokenizer.json, its folder, or a .model file (default: none, for plain bytes)"
    add("--tokenizer-type", required=True, choices=list(TOKENIZERS), help="how text becomes ids")
    add("--tokenizer-model", metavar="PATH", help=model)
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--prepend-bos", action="store_true", help="begin each document with the bos token")
    add("--engine", choices=ENGINES, default="auto", help="auto takes gigatoken where exact")
    add("--verify", type=int, default=8, metavar="N", help="documents to compare gigatoken on")
    add("--verify-all", action="store_true", help="compare every document")


def _add_documents(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--min-tokens", type=int, default=1, metavar="N", help="drop shorter documents")
    add("--max-tokens", type=int, metavar="N", help="split longer documents (default: no limit)")
    add("--long-documents", choices=("split", "drop"), default="split", help="over --max-tokens")
    add("--drop-duplicates", action="store_true", help="keep the first of equal documents")
    share = "report the share of documents as long (default: not reported)"
    add("--seq-length", type=int, metavar="N", help=share)
    add("--target-length", type=int, metavar="T", help=share)


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    ray = "run on a Ray cluster: auto, local, ray://host:port (default: on this machine)"
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json")
    add("--workers", type=int, default=1, metavar="W", help="processes")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="part I of N (default: 0/1)")
    add("--ray", metavar="ADDRESS", help=ray)
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    add("--restart", action="store_true", help="forget what an unfinished job has done")
    part = "text per part of the work, which never changes the result"
    add("--part-bytes", type=int, default=PART_BYTES, metavar="BYTES", help=part)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}, needs I/N as 0/8")
    return int(index), int(count)
