# SPDX-License-Identifier: Apache-2.0
"""Key tokens of documents (2410.23771): those that only a long context tells.

A judge reads each document twice. A token is a key token where its log-probability with all of the
document before it is more than ``ALPHA`` above that with the short context alone, and more than
``BETA`` itself. Short contexts begin ``SHORT`` tokens before a block of ``BLOCK`` tokens, which all
share one; the first ``SHORT`` tokens of a document are never key tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cream.errors import UserError
from megatron_cream.evaluation.forward import (
    ForwardPass,
    ScoringModel,
    progress_bar,
    weigh_tokens,
)
from megatron_cream.options import read_object

SHORT, BLOCK = 4096, 1024
ALPHA, BETA = 2.0, -2.0


@dataclass(frozen=True)
class KeyTokens:
    """Which tokens of some documents are key tokens, and who said so.

    Attributes:
        judge: names and weights of the models that judged, and their dtypes.
        data_content: hash of the documents' tokens.
        document_tokens: tokens of each document.
        places: of each document, ascending places in it.
    """

    judge: dict[str, Any]
    data_content: str
    document_tokens: int
    places: list[list[int]]

    def masks(self) -> list[np.ndarray]:
        """Return bool ``[document_tokens]`` of each document."""
        found = []
        for places in self.places:
            mask = np.zeros(self.document_tokens, dtype=bool)
            mask[places] = True
            found.append(mask)
        return found

    def save(self, path: Path) -> None:
        """Write the file, which must not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read_key_tokens(path: Path, flag: str) -> KeyTokens:
    """Read a file of ``KeyTokens.save``.

    Raises:
        FileNotFoundError, UserError: no such file, or something else; names ``flag``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{flag} is {path}: it must be a file of --save-key-tokens")
    found = read_object(path)
    try:
        kept = KeyTokens(**found)
        right = isinstance(kept.judge, dict) and isinstance(kept.data_content, str)
        right &= all(_ascend(places, kept.document_tokens) for places in kept.places)
    except TypeError:
        right = False
    if not right:
        raise UserError(f"{flag} is {path}: it must be a file of --save-key-tokens")
    return kept


def _ascend(places: list[int], tokens: int) -> bool:
    inside = all(type(place) is int and SHORT <= place < tokens for place in places)
    return inside and all(a < b for a, b in zip(places, places[1:], strict=False))


def full_logprobs(
    model: ScoringModel, documents: list[np.ndarray], short: int = SHORT
) -> list[np.ndarray]:
    """Return log-probabilities with all of a document before them, float64 ``[n - short]`` each.

    Args:
        documents: ids ``[n]`` each, all of the same length.
        short: the first token that has one.
    """
    tokens = len(documents[0])
    model.set_length(tokens)
    rows = torch.arange(short - 1, tokens - 1)
    ids = [torch.from_numpy(document.astype(np.int64))[None] for document in documents]
    passes = (ForwardPass(one[:, :-1], rows, one[:, rows + 1]) for one in ids)
    found = []
    total = len(documents) * weigh_tokens(tokens, tokens)
    with progress_bar("judge, full context", total, model.primary) as bar:
        for scores in model.run(passes):
            found.append(scores.logprobs[0].numpy())
            bar.update(weigh_tokens(tokens, tokens))
    return found


def short_logprobs(
    model: ScoringModel,
    documents: list[np.ndarray],
    batch_tokens: int,
    short: int = SHORT,
    block: int = BLOCK,
) -> list[np.ndarray]:
    """Return log-probabilities with a short context, float64 ``[n - short]`` each document.

    Args:
        documents: ids ``[n]`` each, all of the same length.
        batch_tokens: most input tokens in one forward pass.
        short: tokens of context of the first token of a block; later ones have those of the block
            as well.
        block: tokens that share a context.
    """
    model.set_length(short + block)
    found = []
    work = weigh_tokens(len(documents[0]) * (short + block) // block, short + block)
    with progress_bar("judge, short contexts", len(documents) * work, model.primary) as bar:
        for document in documents:
            batches = _short_batches(document.astype(np.int64), batch_tokens, short, block)
            scores = model.run(_short_pass(batch, short) for batch in batches)
            found.append(np.concatenate([one.logprobs.numpy().ravel() for one in scores]))
            bar.update(work)
    return found


def _short_batches(
    document: np.ndarray, batch_tokens: int, short: int, block: int
) -> Iterator[np.ndarray]:
    """Yield blocks behind their contexts, ``[b, short + block]``; the last one may be shorter."""
    firsts = range(0, len(document) - short, block)
    pieces = [document[first : first + short + block] for first in firsts]
    size = max(1, batch_tokens // (short + block))
    for _, same in groupby(pieces, key=len):
        rows = list(same)
        for first in range(0, len(rows), size):
            yield np.stack(rows[first : first + size])


def _short_pass(rows: np.ndarray, short: int) -> ForwardPass:
    ids = torch.from_numpy(rows)
    kept = torch.arange(short - 1, ids.shape[1] - 1)
    return ForwardPass(ids[:, :-1], kept, ids[:, kept + 1])


def choose_key_tokens(
    full: np.ndarray,
    short: np.ndarray,
    first: int = SHORT,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> list[int]:
    """Return the places of a document's key tokens.

    Args:
        full, short: log-probabilities with either context, of tokens ``first`` and after.
    """
    return (first + np.flatnonzero((full - short > alpha) & (full > beta))).tolist()
