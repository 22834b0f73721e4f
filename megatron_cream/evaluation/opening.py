# SPDX-License-Identifier: Apache-2.0
"""From the command line's words to a model, a prompt and documents, checked against each other."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path

import numpy as np

from megatron_cream.checkpoint.saved import latest_checkpoint, saved_arguments
from megatron_cream.data.documents import read_documents
from megatron_cream.data.reading import read_documents as read_texts
from megatron_cream.data.text import find_inputs
from megatron_cream.data.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation.other_rope import changed_extension, changed_fields
from megatron_cream.evaluation.passes import Model
from megatron_cream.evaluation.prompts import Prompt

_KEPT = "hf"  # where tools/convert_checkpoint.py keeps a model's tokenizer


def open_model(args: Namespace) -> Model:
    """Load the model of --checkpoint or --hf.

    Raises:
        UserError, FileNotFoundError, ImportError: a model that cannot be scored.
    """
    if args.hf is None:
        from megatron_cream.checkpoint.loading import Layout
        from megatron_cream.evaluation.megatron import MegatronModel

        layout = Layout(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
        )
        return MegatronModel(args.checkpoint, changed_extension(args), layout)
    from megatron_cream.evaluation.huggingface import HuggingFaceModel

    return HuggingFaceModel(args.hf, args.dtype, rope=changed_fields(args))


def fingerprint(path: str) -> str:
    """Return a hash of names, sizes and dates of a model's files.

    A run is not continued with other weights under the same name.
    """
    root = Path(path)
    folder = root if (root / "config.json").is_file() else latest_checkpoint(path)
    found = sorted((folder or root).glob("*"))
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_tokenizer(args: Namespace) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer, and the folder or file it came from.

    Without --tokenizer-type it is the one in the Hugging Face folder, or the one that an imported
    checkpoint keeps, or the one that a trained checkpoint says it was trained with.

    Raises:
        UserError, FileNotFoundError: none there, or one that cannot be read.
    """
    if args.tokenizer_type is not None:
        return load_tokenizer(args.tokenizer_type, args.tokenizer_model), args.tokenizer_model
    places = [Path(args.hf)] if args.hf else _kept_places(args.checkpoint)
    for place in places:
        if (place / "tokenizer.json").is_file():
            return load_tokenizer("HuggingFaceTokenizer", place), str(place)
        if (place / "tokenizer.model").is_file():
            model = place / "tokenizer.model"
            return load_tokenizer("SentencePieceTokenizer", model), str(model)
    trained = None if args.hf else _trained_with(args.checkpoint)
    if trained is not None:
        return load_tokenizer(*trained), trained[1]
    raise UserError(
        f"--tokenizer-type is not given: there is no tokenizer.json or tokenizer.model in "
        f"{places[0]}; name the tokenizer as in tools/preprocess_data.py"
    )


def _trained_with(checkpoint: str) -> tuple[str, str] | None:
    """Return type and path of the tokenizer in a checkpoint's saved arguments, if it is there."""
    saved = saved_arguments(checkpoint)
    kind, path = (getattr(saved, name, None) for name in ("tokenizer_type", "tokenizer_model"))
    usable = kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer") and path is not None
    return (kind, path) if usable and Path(path).exists() else None


def _kept_places(checkpoint: str) -> list[Path]:
    folder = latest_checkpoint(checkpoint)
    return [Path(checkpoint) / _KEPT] + ([folder / _KEPT] if folder else [])


def open_prompt(args: Namespace, model: Model) -> Prompt:
    """Return the tokenizer in the asked style, if it is the model's.

    Raises:
        UserError: the tokenizer has another number of tokens than the model.
    """
    tokenizer, source = open_tokenizer(args)
    check_vocabulary(tokenizer, model)
    return Prompt(tokenizer, args.prompt, args.bos, source)


def check_vocabulary(tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer that is not the model's, as far as their sizes tell.

    A model may have some rows more than its tokenizer has tokens (Qwen's have), never fewer.

    Raises:
        UserError: naming both sizes.
    """
    most, size = model.vocabulary, tokenizer.vocab_size
    if size > most or size < 0.9 * most - 1024:
        raise UserError(
            f"--tokenizer-model has {size} tokens, {model.name} has {most}: it must be the "
            "tokenizer that the model was trained with"
        )


def open_documents(args: Namespace, model: Model, tokens: int) -> list[np.ndarray]:
    """Return ``--documents`` documents of ``tokens`` tokens out of --data.

    It is an indexed dataset, or text that the model's tokenizer encodes.

    Raises:
        UserError, FileNotFoundError: no such data, or too little of it, or not the model's tokens.
    """
    if Path(f"{args.data}.idx").exists() or not Path(args.data).exists():
        documents = read_documents(args.data, args.documents, tokens)
    else:
        documents = _encode_texts(args, model, tokens)
    highest = max(int(document.max()) for document in documents)
    if highest >= model.vocabulary:
        raise UserError(
            f"--data is {args.data}: it has token {highest}, the model's vocabulary has "
            f"{model.vocabulary}; it must be written with the model's tokenizer"
        )
    return documents


def _encode_texts(args: Namespace, model: Model, tokens: int) -> list[np.ndarray]:
    tokenizer, _ = open_tokenizer(args)
    check_vocabulary(tokenizer, model)
    documents, longest = [], 0
    for path in find_inputs([args.data]).files:
        for text in read_texts(path):
            ids = tokenizer.encode([text[: 32 * tokens]])[0]
            longest = max(longest, len(ids))
            if len(ids) >= tokens:
                documents.append(ids[:tokens])
            if len(documents) == args.documents:
                return documents
    raise UserError(
        f"--data is {args.data}: {len(documents)} of its texts have {tokens} tokens (the longest "
        f"has {longest}), --documents asks for {args.documents}; take fewer or shorter ones "
        "(--document-tokens)"
    )
