# SPDX-License-Identifier: Apache-2.0
"""One evaluation of one checkpoint: load, score, table, JSON."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cream.checkpoint.loading import load_model
from megatron_cream.checkpoint.saved import saved_arguments, saved_extension
from megatron_cream.config import ExtensionConfig
from megatron_cream.data.documents import read_documents
from megatron_cream.evaluation.perplexity import Perplexity, cost, perplexity


def run_perplexity(args: Namespace) -> str:
    """Score a checkpoint at several lengths and return the table; write JSON if asked to.

    Raises:
        ValueError, FileNotFoundError: input that cannot be scored, before the model is built.
    """
    extension, results = score(args)
    if args.output:
        record = _record(args, extension, results)
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n")
    return table(results)


def score(args: Namespace) -> tuple[ExtensionConfig, list[Perplexity]]:
    """Return the settings a checkpoint was scored with, and its perplexity at each length.

    ``args`` has the options of tools/evaluate.py perplexity.
    """
    lengths = sorted(set(args.lengths))
    if lengths[0] < 1:
        raise ValueError(f"--lengths has {lengths[0]}: each must be at least 1 token")
    tokens = args.document_tokens or 2 * lengths[-1] + 1
    documents = read_documents(args.data, args.documents, tokens)
    strides = {length: args.stride or max(1, length // 2) for length in lengths}
    total = sum(cost(documents, length, strides[length]) for length in lengths)
    model = load_model(args.checkpoint, _extension(args))
    results = []
    with tqdm(total=total, unit="tok", unit_scale=True, desc=args.title) as bar:
        for length in lengths:
            stride = strides[length]
            found = perplexity(
                model.module, documents, length, stride, args.batch_tokens, bar.update
            )
            results.append(found)
    return model.extension, results


def table(results: list[Perplexity]) -> str:
    """Return lengths and perplexities for a person."""
    rows = [f"{'length':>8} {'perplexity':>12} {'targets':>9}"]
    rows += [f"{r.length:>8} {r.value:>12.3f} {r.targets:>9}" for r in results]
    return "\n".join(rows)


def _extension(args: Namespace) -> ExtensionConfig | None:
    """The settings to evaluate with where they are not the checkpoint's own."""
    changes = {
        field: value
        for field in ("rope_interpolation", "rope_factor")
        if (value := getattr(args, field)) is not None
    }
    saved = saved_arguments(args.checkpoint) if changes else None
    extension = saved_extension(saved) if saved is not None else None
    return dataclasses.replace(extension, **changes) if extension is not None else None


def _record(
    args: Namespace, extension: ExtensionConfig, results: list[Perplexity]
) -> dict[str, Any]:
    return {
        "task": "perplexity",
        "checkpoint": args.checkpoint,
        "data": args.data,
        "documents": args.documents,
        "settings": extension.to_dict(),
        "results": [{**dataclasses.asdict(r), "perplexity": r.value} for r in results],
    }
