# SPDX-License-Identifier: Apache-2.0
"""Perplexity of one model: documents scored and written, continued where they were killed."""

from __future__ import annotations

import dataclasses
import hashlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cream.evaluation.forward import Model
from megatron_cream.evaluation.models import open_documents
from megatron_cream.evaluation.perplexity import cost, score_document
from megatron_cream.evaluation.progress import finish, progress_bar, settings, weighed
from megatron_cream.evaluation.result_files import DOCUMENTS
from megatron_cream.evaluation.results import perplexity_results
from megatron_cream.evaluation.store import Store


def score_perplexity(
    args: Namespace,
    model: Model,
    task: str = "perplexity",
    folder: str | None = None,
    documents: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Score documents at every length and return the results; write them if there is a folder.

    Args:
        documents: ids ``[n]`` each, of ``document_tokens(args)`` tokens; those of --data unless
            given.
    """
    tokens = document_tokens(args)
    documents = documents or open_documents(args, model, tokens)
    strides = strides_of(args)
    works = {
        length: weighed(cost(tokens, length, stride), length) for length, stride in strides.items()
    }
    kept = settings(args, model, task) | {
        "data": args.data,
        "documents": args.documents,
        "document_tokens": tokens,
        "stride": args.stride,
        "data_content": _content(documents),
    }
    total = len(documents) * sum(works.values())
    with (
        Store(folder, kept, DOCUMENTS, model.primary) as store,
        progress_bar(args.name or task, total, model.primary) as bar,
    ):
        known = {(length, i) for length in args.lengths for i in range(len(documents))}
        store.refuse_foreign(set(args.lengths), known)
        done = {DOCUMENTS.identity(record) for record in store.finished}
        for length in args.lengths:
            model.set_length(length)
            for number, document in enumerate(documents):
                if (length, number) in done:
                    bar.update(works[length])
                    continue
                report = _reporter(bar, length)
                found = score_document(
                    model, document, length, strides[length], number, args.batch_tokens, report
                )
                store.add([dataclasses.asdict(found)])
        result = kept | perplexity_results(store.finished)
        finish(store, result)
    return result


def document_tokens(args: Namespace) -> int:
    """Return the tokens of each document to score."""
    return args.document_tokens or 2 * args.lengths[-1] + 1


def strides_of(args: Namespace) -> dict[int, int]:
    """Return the tokens between windows of each length."""
    return {length: args.stride or max(1, length // 2) for length in args.lengths}


def _content(documents: list[np.ndarray]) -> str:
    """Hash the documents: a run is not continued with other ones under the same name."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.astype("<i8").tobytes())
    return found.hexdigest()[:16]


def _reporter(bar: tqdm, length: int) -> Callable[[int], None]:
    return lambda tokens: bar.update(weighed(tokens, length))
