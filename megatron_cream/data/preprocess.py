# SPDX-License-Identifier: Apache-2.0
"""Text to a Megatron indexed dataset: `PREFIX.bin`, `PREFIX.idx` and a note, `PREFIX.json`.

Nothing here imports megatron before the job is checked.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream.data.publish import SUFFIXES, check_absent, publish
from megatron_cream.data.text import TextInputs, find_inputs, read_documents
from megatron_cream.data.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.data.workers import tokenized

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PreprocessConfig:
    """A job; the fields are the flags of `tools/preprocess_data.py`."""

    input: tuple[str, ...]
    tokenizer_type: str
    output_prefix: str
    tokenizer_model: str | None = None
    json_key: str = "text"
    append_eod: bool = False
    prepend_bos: bool = False
    min_tokens: int = 1
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class PreprocessStats:
    """What a job did. Lengths are in tokens as written, eod and bos included."""

    documents: int
    tokens: int
    shorter_than_min_tokens: int
    mean_document: float
    median_document: float
    longest_document: int
    skipped_files: int
    input_bytes: int
    seconds: float
    files: tuple[str, ...]

    def summary(self) -> str:
        """Lines for a person; MB/s is in bytes of input read, 10**6 to the MB."""
        return "\n".join(
            (
                f"documents: {self.documents}",
                f"tokens: {self.tokens}",
                f"dropped: {self.shorter_than_min_tokens} shorter than --min-tokens",
                f"left out: {self.skipped_files} files of other kinds",
                f"tokens per document: mean {self.mean_document:.1f}, "
                f"median {self.median_document:.1f}, longest {self.longest_document}",
                f"speed: {self.input_bytes / 1e6 / self.seconds:.2f} MB/s",
                f"written: {' '.join(self.files)}",
            )
        )


def preprocess(config: PreprocessConfig, *, progress: bool = True) -> PreprocessStats:
    """Tokenize the input documents, one sequence each, into an indexed dataset.

    The three files appear whole or not at all, and are the same bytes for every number of
    workers. With two or more workers a script must call this under
    `if __name__ == "__main__":`, since they are fresh interpreters.

    Args:
        config: the job.
        progress: whether to show a bar on stderr, in bytes of input read.

    Raises:
        ValueError: a setting that cannot work, broken input, or no document left.
        OSError: a file that is missing or exists, cannot be read or written, or a worker that
            died (`ChildProcessError`).
    """
    tokenizer, inputs = _check(config)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    started = time.perf_counter()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    folder, name = os.path.split(config.output_prefix)
    with tempfile.TemporaryDirectory(dir=folder or ".", prefix=f".{name}.", suffix=".tmp") as tmp:
        staged = os.path.join(tmp, "data")
        builder = IndexedDatasetBuilder(staged + ".bin", dtype=dtype)
        with closing(builder.data_file):
            dropped = _write_documents(config, tokenizer, inputs, builder, progress)
            builder.finalize(staged + ".idx")
        lengths = np.array(builder.sequence_lengths, dtype=np.int64)
        note = _note(config, tokenizer, lengths, dropped, np.dtype(dtype).name)
        Path(staged + ".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        files = publish(staged, config.output_prefix, config.overwrite)
    return PreprocessStats(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        shorter_than_min_tokens=dropped,
        mean_document=float(lengths.mean()),
        median_document=float(np.median(lengths)),
        longest_document=int(lengths.max()),
        skipped_files=inputs.skipped,
        input_bytes=inputs.total_bytes,
        seconds=time.perf_counter() - started,
        files=files,
    )


def _check(config: PreprocessConfig) -> tuple[Tokenizer, TextInputs]:
    """Everything that can be found wrong before any input is read."""
    for flag, value in (("--workers", config.workers), ("--min-tokens", config.min_tokens)):
        if value < 1:
            raise ValueError(f"{flag} {value}: needs 1 or more")
    _check_output(config)
    tokenizer = load_tokenizer(config.tokenizer_type, config.tokenizer_model)
    wanted = (
        ("--append-eod", config.append_eod, "an end of document", tokenizer.eod),
        ("--prepend-bos", config.prepend_bos, "a beginning of sequence", tokenizer.bos),
    )
    for flag, asked, kind, token in wanted:
        if asked and token is None:
            model = config.tokenizer_model or tokenizer.name
            raise ValueError(f"{flag}: {model} has none, needs a tokenizer with {kind} token")
    inputs = find_inputs(config.input)
    targets = {os.path.realpath(config.output_prefix + suffix) for suffix in SUFFIXES}
    for path in inputs.files:
        if os.path.realpath(path) in targets:
            raise ValueError(
                f"--output-prefix {config.output_prefix}: {path} is an input, needs another prefix"
            )
    return tokenizer, inputs


def _check_output(config: PreprocessConfig) -> None:
    where = f"--output-prefix {config.output_prefix}"
    folder, name = os.path.split(config.output_prefix)
    if not name:
        raise ValueError(f"{where}: names a folder, needs FOLDER/NAME")
    if not os.path.isdir(folder or "."):
        raise FileNotFoundError(f"{where}: no folder {folder}, needs one that exists")
    if not os.access(folder or ".", os.W_OK | os.X_OK):
        raise ValueError(f"{where}: folder {folder or '.'} needs to be writable")
    check_absent(config.output_prefix, config.overwrite)


def _write_documents(
    config: PreprocessConfig, tokenizer: Tokenizer, inputs: TextInputs, builder: Any, progress: bool
) -> int:
    """Add every document that is long enough to `builder`; returns how many were not."""
    head = np.array([tokenizer.bos] if config.prepend_bos else [], dtype=np.int32)
    tail = np.array([tokenizer.eod] if config.append_eod else [], dtype=np.int32)
    source = (config.tokenizer_type, config.tokenizer_model)
    dropped = longest = 0
    with (
        tqdm(total=inputs.total_bytes, unit="B", unit_scale=True, disable=not progress) as bar,
        closing(
            tokenized(_documents(config, inputs, bar), tokenizer, source, config.workers)
        ) as rows,
    ):
        for ids in rows:
            longest = max(longest, len(ids))
            if len(ids) < config.min_tokens:
                dropped += 1
                continue
            sequence = np.concatenate((head, ids, tail))
            builder.add_document(sequence, [len(sequence)])
    if longest == 0:
        given = " ".join(config.input)
        raise ValueError(f"--input {given}: holds no text, needs one document that is not empty")
    if len(builder.sequence_lengths) == 0:
        raise ValueError(
            f"--min-tokens {config.min_tokens}: none of the {dropped} documents is left, "
            f"needs at most {longest}, the tokens of the longest"
        )
    return dropped


def _documents(config: PreprocessConfig, inputs: TextInputs, bar: tqdm) -> Iterator[str]:
    for path in inputs.files:
        yield from read_documents(path, config.json_key, bar.update)


def _note(
    config: PreprocessConfig, tokenizer: Tokenizer, lengths: np.ndarray, dropped: int, dtype: str
) -> dict[str, Any]:
    """The content of `PREFIX.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer_type": config.tokenizer_type,
        "tokenizer_model": config.tokenizer_model,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
        "bos_id": tokenizer.bos,
        "appended_eod": config.append_eod,
        "prepended_bos": config.prepend_bos,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "dropped": {"shorter_than_min_tokens": dropped},
        "min_tokens": config.min_tokens,
        "longest_document": int(lengths.max()),
        "dtype": dtype,
    }
