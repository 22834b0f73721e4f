# SPDX-License-Identifier: Apache-2.0
"""LongPPL (2410.23771): perplexity of the tokens that only a long context tells.

At each length L it is that of the key tokens among the first L of each document, all of them in
one window; which tokens those are, a judge says, or a file that another run kept.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ScoringModel
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.key_tokens import (
    ALPHA,
    BETA,
    BLOCK,
    SHORT,
    KeyTokens,
    choose_key_tokens,
    full_logprobs,
    read_key_tokens,
    short_logprobs,
)
from megatron_cream.evaluation.perplexity import (
    document_settings,
    hash_documents,
    open_documents,
    score_documents,
)
from megatron_cream.evaluation.result_files import KEY_DOCUMENT_RECORDS
from megatron_cream.evaluation.results import longppl_results
from megatron_cream.evaluation.store import hash_files, open_store


def validate_flags(settings: EvaluationSettings) -> None:
    """Check what can be checked without a model.

    Raises:
        UserError, FileNotFoundError: naming the flag.
    """
    if list(settings.tasks) != ["longppl"]:
        raise UserError(f"--tasks has {', '.join(settings.tasks)}: longppl must be the only one")
    if settings.lengths[0] <= SHORT:
        raise UserError(
            f"--lengths has {settings.lengths[0]}: LongPPL needs more than {SHORT}, the first "
            f"{SHORT} tokens of a document are never key tokens"
        )
    if (settings.judge is None) == (settings.key_tokens is None):
        raise UserError("--judge or --key-tokens: exactly one of them must be given")
    if settings.key_tokens is not None:
        for flag, value in (
            ("--judge-short", settings.judge_short),
            ("--save-key-tokens", settings.save_key_tokens),
        ):
            if value is not None:
                raise UserError(f"{flag} is {value} with --key-tokens: it must be left out")
        read_key_tokens(Path(settings.key_tokens), "--key-tokens")
    for flag, value in (("--judge", settings.judge), ("--judge-short", settings.judge_short)):
        if value is not None and not (Path(value) / "config.json").is_file():
            raise FileNotFoundError(f"{flag} is {value}: it must be a folder with a config.json")


def score_longppl(settings: EvaluationSettings, model: ScoringModel) -> dict[str, Any]:
    """Score documents at every length and return the results; write them if there is a folder.

    A run that was killed is continued: documents that the folder has are not scored again.

    Raises:
        UserError: key tokens of other documents, or none at all.
    """
    kept = _kept(settings)
    if kept is not None and settings.document_tokens is None:
        settings.document_tokens = kept.document_tokens
    documents = open_documents(settings, model)
    content = hash_documents(documents)
    if kept is not None:
        _validate_same(settings, kept, content, len(documents))
    else:
        kept = judge_documents(settings, documents, content)
        if settings.save_key_tokens is not None and model.primary:
            kept.save(Path(settings.save_key_tokens))
    _validate_some(settings, kept)
    decisive = document_settings(settings, documents) | {"key_tokens": kept.judge}
    with open_store(settings, model, "longppl", decisive, KEY_DOCUMENT_RECORDS) as store:
        score_documents(settings, model, documents, store, kept.masks())
        return store.finish(longppl_results(store.finished))


def _kept(settings: EvaluationSettings) -> KeyTokens | None:
    """Return the key tokens that a file has; of --save-key-tokens if a killed run wrote it."""
    if settings.key_tokens is not None:
        return read_key_tokens(Path(settings.key_tokens), "--key-tokens")
    if settings.save_key_tokens is None or not Path(settings.save_key_tokens).exists():
        return None
    path = Path(settings.save_key_tokens)
    kept = read_key_tokens(path, "--save-key-tokens")
    if kept.judge != _judge(settings):
        raise UserError(
            f"--save-key-tokens is {path}: it has key tokens of another judge; name a new file, or "
            "give this one to --key-tokens"
        )
    return kept


def _validate_same(
    settings: EvaluationSettings, kept: KeyTokens, content: str, documents: int
) -> None:
    flag, path = (
        ("--key-tokens", settings.key_tokens)
        if settings.key_tokens is not None
        else ("--save-key-tokens", settings.save_key_tokens)
    )
    here = (documents, settings.tokens_per_document)
    there = (len(kept.places), kept.document_tokens)
    if here != there:
        raise UserError(
            f"{flag} is {path}: it is of {there[0]} documents of {there[1]} tokens, --documents "
            f"and --document-tokens are {here[0]} and {here[1]}; they must be the same"
        )
    if content != kept.data_content:
        raise UserError(
            f"{flag} is {path}: it is of other documents than those of --data, or of another "
            "tokenizer; they must be the same, token for token"
        )


def _validate_some(settings: EvaluationSettings, kept: KeyTokens) -> None:
    shortest = settings.lengths[0]
    if not any(places and places[0] < shortest for places in kept.places):
        raise UserError(
            f"--lengths has {shortest}: the judge finds no key token in the first {shortest} "
            f"tokens of {len(kept.places)} documents; take longer ones or more documents"
        )


def judge_documents(
    settings: EvaluationSettings, documents: list[np.ndarray], content: str
) -> KeyTokens:
    """Have --judge and --judge-short say which tokens are key tokens.

    Raises:
        UserError: a folder that transformers cannot read.
    """
    judge = str(settings.judge)
    full = _ask(judge, settings, lambda model: full_logprobs(model, documents))
    short = _ask(
        settings.judge_short or judge,
        settings,
        lambda model: short_logprobs(model, documents, settings.batch_tokens),
    )
    places = [choose_key_tokens(*both) for both in zip(full, short, strict=True)]
    return KeyTokens(_judge(settings), content, settings.tokens_per_document, places)


def _ask(
    folder: str, settings: EvaluationSettings, read: Callable[[ScoringModel], list[np.ndarray]]
) -> list[np.ndarray]:
    """Load a judge, have it read, and let its memory go."""
    model = HuggingFaceModel(folder, settings.dtype)
    found = read(model)
    del model
    gc.collect()
    return found


def _judge(settings: EvaluationSettings) -> dict[str, Any]:
    """Return what decides which tokens are key tokens."""
    judge = str(settings.judge)
    short = settings.judge_short or judge
    return {
        "judge": judge,
        "judge_weights": hash_files(judge),
        "judge_short": short,
        "judge_short_weights": hash_files(short),
        "dtype": settings.dtype,
        **{"short_context": SHORT, "block": BLOCK, "alpha": ALPHA, "beta": BETA},
    }
