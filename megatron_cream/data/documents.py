# SPDX-License-Identifier: Apache-2.0
"""Whole documents out of an indexed dataset, for evaluation."""

from __future__ import annotations

import numpy as np

from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError


def read_documents(prefix: str, count: int, tokens: int) -> list[np.ndarray]:
    """Return the first ``tokens`` tokens of ``count`` documents that have as many.

    The documents are spread evenly over those that are long enough, in order.

    Raises:
        UserError: fewer than ``count`` documents are long enough.
    """
    index = read_index(prefix)
    eligible = np.flatnonzero(index.lengths >= tokens)
    if len(eligible) < count:
        longest = int(index.lengths.max())
        raise UserError(
            f"--data is {prefix}: {len(eligible)} of its documents have {tokens} tokens (the "
            f"longest has {longest}), --documents asks for {count}; take fewer or shorter ones "
            "(--document-tokens)"
        )
    chosen = eligible[np.linspace(0, len(eligible) - 1, count).round().astype(int)]
    data = np.memmap(prefix + ".bin", mode="r", dtype=index.dtype)
    starts = index.pointers[chosen] // index.dtype.itemsize
    return [np.array(data[start : start + tokens]) for start in starts]
