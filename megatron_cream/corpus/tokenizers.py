# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one small protocol, by the name of their type."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_cream.corpus.tokenizer_types import (
    ByteLevelTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from megatron_cream.corpus.train_bpe import train_bpe
from megatron_cream.errors import UserError

__all__ = [
    "TOKENIZERS",
    "ByteLevelTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_bpe",
]


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        name: the tokenizer type, as `load_tokenizer` takes it.
        vocab_size: one more than the largest id.
        eod: id that ends a document, None where the vocabulary has none.
        bos: id that begins a document, None where the vocabulary has none.
    """

    name: str
    vocab_size: int
    eod: int | None
    bos: int | None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: int32 arrays of shape (tokens,), no bos or eod added."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, special tokens included."""
        ...


TOKENIZERS: dict[str, Any] = {
    cls.name: cls for cls in (HuggingFaceTokenizer, SentencePieceTokenizer, ByteLevelTokenizer)
}


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer by the name of its type.

    Raises:
        UserError: an unknown type, or a model that is not given, not wanted or broken.
        FileNotFoundError: a model file that does not exist.
    """
    if tokenizer_type not in TOKENIZERS:
        raise UserError(f"--tokenizer-type {tokenizer_type}: needs one of {', '.join(TOKENIZERS)}")
    if tokenizer_type == ByteLevelTokenizer.name:
        if tokenizer_model is not None:
            raise UserError(
                f"--tokenizer-model {tokenizer_model}: {tokenizer_type} needs it left out"
            )
        return ByteLevelTokenizer()
    if not tokenizer_model:
        raise UserError(f"--tokenizer-model (not given): {tokenizer_type} needs a path")
    return TOKENIZERS[tokenizer_type](tokenizer_model)
