# SPDX-License-Identifier: Apache-2.0
"""Text for the demo: split, tokenizer, indexed datasets."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from megatron_cream.corpus.input_files import find_inputs
from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.readers import read_documents
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError

HELD_OUT = 8  # every eighth document
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read(inputs: list[str] | None) -> list[str]:
    """Return the documents of files or folders; of the Python standard library without any.

    Raises:
        UserError, FileNotFoundError: text that cannot be read, or a single document.
    """
    texts = list(_documents(inputs))
    size = sum(map(len, texts)) / 1e6
    source = " ".join(inputs) if inputs else "the Python standard library"
    print(f"text: {len(texts)} documents, {size:.1f} M characters from {source}")
    if len(texts) < 2:
        raise UserError(f"INPUT holds {len(texts)} documents: it must hold at least 2")
    return texts


def digest(texts: list[str]) -> str:
    """Return eight letters that stand for these documents and no others."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


def prepare(texts: list[str], folder: Path, vocabulary: int, shortest: int, longest: int) -> None:
    """Write ``train`` and ``held-out`` as JSONL and datasets, and a tokenizer, into ``folder``.

    Args:
        texts: the documents.
        folder: where all of it goes.
        vocabulary: tokens of the byte-level BPE.
        shortest: tokens below which a document is dropped from training.
        longest: tokens a held-out document must have to be evaluated on.

    Raises:
        UserError: text that is too short.
    """
    parts = {
        "train": [text for i, text in enumerate(texts) if i % HELD_OUT],
        "held-out": [text for i, text in enumerate(texts) if not i % HELD_OUT],
    }
    train_bpe(parts["train"], vocabulary, folder / "tokenizer")
    for part, documents in parts.items():
        lines = (json.dumps({"text": text}) for text in documents)
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        config = PreprocessConfig(
            input=(str(folder / f"{part}.jsonl"),),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder / "tokenizer"),
            output_prefix=str(folder / part),
            append_eod=True,
            min_tokens=shortest,
            overwrite=True,
        )
        stats = preprocess(config)
        print(f"{part}: {stats.documents} documents, {stats.tokens} tokens")
    lengths = read_index(folder / "held-out").lengths
    if lengths.max() < longest:
        raise UserError(
            f"INPUT's longest held-out document has {lengths.max()} tokens: evaluating at the "
            f"target length needs {longest}"
        )


def _documents(inputs: list[str] | None) -> Iterable[str]:
    if inputs:
        for path in find_inputs(inputs).files:
            yield from read_documents(path)
        return
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _NOT_LIBRARY & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")
