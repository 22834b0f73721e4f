# SPDX-License-Identifier: Apache-2.0
"""LongPPL (2410.23771): perplexity of the tokens that only a long context tells.

At each length L it is that of the key tokens among the first L of each document, all of them in
one window; which tokens those are, a judge says, or a file that another run kept.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import (
    ForwardPass,
    ScoringModel,
    progress_bar,
    weigh_tokens,
)
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.perplexity import (
    document_settings,
    hash_documents,
    open_documents,
    perplexity_results,
    score_documents,
)
from megatron_cream.evaluation.result_files import KEY_DOCUMENT_RECORDS
from megatron_cream.evaluation.results import (
    Records,
    grouped,
    perplexity_interval,
    perplexity_of,
)
from megatron_cream.evaluation.store import hash_files, open_store
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


def longppl_results(documents: Records) -> dict[str, Any]:
    """Return LongPPL by length beside what ``perplexity_results`` has.

    Args:
        documents: ``DocumentScore`` records with key tokens.
    """
    found = perplexity_results(documents)
    groups = grouped(documents, lambda d: d["length"])
    found["lengths"] = [row | _key(own) for row, own in zip(found["lengths"], groups, strict=True)]
    return found


def _key(documents: Records) -> dict[str, Any]:
    """Return LongPPL of one length, over the key tokens of all documents together.

    Documents have unequal numbers of them: the interval is that of a ratio of two sums.
    """
    documents = sorted(documents, key=lambda d: d["document"])
    nll = np.array([d["key_nll"] for d in documents])
    targets = np.array([d["key_targets"] for d in documents])
    mean = float(nll.sum() / targets.sum())
    low, high = perplexity_interval((mean + (nll - mean * targets) / targets.mean()).tolist())
    return {
        "longppl": perplexity_of(mean),
        "longppl_low": low,
        "longppl_high": high,
        "key_targets": int(targets.sum()),
        "document_key_nll": nll.tolist(),
        "document_key_targets": targets.tolist(),
    }


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
