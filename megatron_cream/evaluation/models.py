# SPDX-License-Identifier: Apache-2.0
"""From the command line's words to a model, a prompt and documents, checked against each other."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path

import numpy as np

from megatron_cream.checkpoint.hf_files import find_kept_files
from megatron_cream.checkpoint.iterations import find_checkpoint, read_saved_arguments
from megatron_cream.corpus.readers import find_inputs
from megatron_cream.corpus.readers import read_documents as read_texts
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.data.indexed import read_documents
from megatron_cream.errors import UserError
from megatron_cream.evaluation.forward import Model
from megatron_cream.evaluation.other_rope import changed_extension, changed_fields
from megatron_cream.evaluation.prompts import Prompt


def open_model(args: Namespace) -> Model:
    """Load the model of --checkpoint or --hf.

    Raises:
        UserError, FileNotFoundError, ImportError: a model that cannot be scored.
    """
    if args.hf is None:
        require_gpu()
        from megatron_cream.evaluation.megatron_model import MegatronModel
        from megatron_cream.parallel_layout import ParallelLayout

        layout = ParallelLayout(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
        )
        return MegatronModel(args.checkpoint, changed_extension(args), layout)
    from megatron_cream.evaluation.hf_model import HuggingFaceModel

    return HuggingFaceModel(args.hf, args.dtype, rope=changed_fields(args))


def require_gpu(flag: str = "--cpu") -> None:
    """Refuse a checkpoint on a machine with no GPU, unless the CPU stands in for it.

    Raises:
        UserError: naming the flag.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{flag} is not given, and this machine has no GPU that PyTorch sees: a Megatron "
            f"checkpoint needs one, or {flag}"
        )


def fingerprint(path: str) -> str:
    """Return a hash of names, sizes and dates of a model's files.

    A run is not continued with other weights under the same name.
    """
    root = Path(path)
    folder = root if (root / "config.json").is_file() else find_checkpoint(path)
    found = sorted((folder or root).glob("*"))
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def open_tokenizer(args: Namespace) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer, and the folder or file it came from.

    Without --tokenizer-type it is the one in the Hugging Face folder, or the one that a trained
    checkpoint says it was trained with, or, as in an export, the one that the import keeps which
    the run goes back to.

    Raises:
        UserError, FileNotFoundError: none there, or one that cannot be read.
    """
    if args.tokenizer_type is not None:
        return load_tokenizer(args.tokenizer_type, args.tokenizer_model), args.tokenizer_model
    if args.hf:
        return _in_folder(Path(args.hf), f"in {args.hf}")
    saved = read_saved_arguments(args.checkpoint)
    trained = _trained_with(saved)
    if trained is not None:
        return load_tokenizer(*trained), trained[1]
    try:
        kept = find_kept_files(args.checkpoint, saved)
    except FileNotFoundError:
        kept = None
    return _in_folder(kept, f"beside {args.checkpoint} or the import that it goes back to")


def _in_folder(folder: Path | None, where: str) -> tuple[Tokenizer, str]:
    """Return the tokenizer in a Hugging Face folder.

    Raises:
        UserError: none there.
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        return load_tokenizer("HuggingFaceTokenizer", folder), str(folder)
    if folder is not None and (model := folder / "tokenizer.model").is_file():
        return load_tokenizer("SentencePieceTokenizer", model), str(model)
    raise UserError(
        f"--tokenizer-type is not given: there is no tokenizer.json or tokenizer.model {where}; "
        "name the tokenizer as in tools/preprocess_data.py"
    )


def _trained_with(saved: Namespace) -> tuple[str, str] | None:
    """Return type and path of the tokenizer in a checkpoint's saved arguments, if it is there."""
    kind, path = (getattr(saved, name, None) for name in ("tokenizer_type", "tokenizer_model"))
    usable = kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer") and path is not None
    return (kind, path) if usable and Path(path).exists() else None


def open_prompt(args: Namespace) -> Prompt:
    """Return the tokenizer in the asked style.

    Raises:
        UserError, FileNotFoundError: as ``open_tokenizer``, or no such style.
    """
    tokenizer, source = open_tokenizer(args)
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
    if (lowest := min(int(document.min()) for document in documents)) < 0:
        raise UserError(f"--data is {args.data}: it has token {lowest}, which is no token")
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
