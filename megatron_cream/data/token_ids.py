# SPDX-License-Identifier: Apache-2.0
"""Token ids of a dataset against a vocabulary: all of them, or those at a sample of places.

An id past the vocabulary has no row in an embedding that is split over tensor-parallel ranks: each
takes it for another's, and the model trains on zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_cream.data.indexed import DatasetIndex
from megatron_cream.errors import UserError

_BLOCK_TOKENS = 1 << 22
_PLACES = 256
_PLACE_TOKENS = 1 << 12


def check_tokens(index: DatasetIndex, limit: int | None) -> int:
    """Read every token of a dataset and return the largest.

    Args:
        index: of a dataset that has tokens.
        limit: what all must be below; None where that is not known.

    Raises:
        UserError: a token is negative or not below ``limit``.
    """
    tokens = _tokens(index)
    starts = range(0, len(tokens), _BLOCK_TOKENS)
    return _largest(index, tokens, starts, _BLOCK_TOKENS, limit)


def check_token_sample(index: DatasetIndex, limit: int | None) -> int:
    """Read the tokens at 256 places of a dataset, its first and last among them; as above."""
    tokens = _tokens(index)
    last = max(len(tokens) - _PLACE_TOKENS, 0)
    starts = np.unique(np.linspace(0, last, _PLACES).astype(np.int64)).tolist()
    return _largest(index, tokens, starts, _PLACE_TOKENS, limit)


def _tokens(index: DatasetIndex) -> np.ndarray:
    return np.memmap(index.prefix + ".bin", mode="r", dtype=index.dtype)


def _largest(
    index: DatasetIndex, tokens: np.ndarray, starts: Iterable[int], size: int, limit: int | None
) -> int:
    largest = 0
    for start in starts:
        block = tokens[start : start + size]
        low, high = int(block.min()), int(block.max())
        if low < 0:
            raise UserError(f"{index.prefix}.bin holds a negative token, {low}")
        if limit is not None and high >= limit:
            raise UserError(
                f"{index.prefix}.bin holds token {high}, needs all below vocab_size {limit}"
            )
        largest = max(largest, high)
    return largest
