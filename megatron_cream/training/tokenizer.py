# SPDX-License-Identifier: Apache-2.0
"""Whether the tokenizer that Megatron will load is to be had, asked before it starts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_cream.errors import UserError

_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
}
_OF_HUB = ("HuggingFaceTokenizer", "SFTTokenizer")
_HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_TIMEOUT = 10.0  # seconds; Megatron's own look, with its repetitions, takes a minute
_ADVICE = "or take --tokenizer-type NullTokenizer with --vocab-size, datasets hold tokens already"


def validate_available(args: Namespace) -> None:
    """Refuse a tokenizer whose files are neither here nor on a hub within reach.

    Raises:
        UserError: naming the flag.
        FileNotFoundError: likewise, with the file.
    """
    for attribute in _FILES.get(args.tokenizer_type, ()):
        flag, path = f"--{attribute.replace('_', '-')}", getattr(args, attribute)
        if path is None:
            raise UserError(f"{flag} is missing: --tokenizer-type {args.tokenizer_type} reads it")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{flag} is {path}: it must be an existing file; {_ADVICE}")
    if args.tokenizer_type in _OF_HUB:
        _refuse_absent_name(args.tokenizer_type, args.tokenizer_model)


def _refuse_absent_name(kind: str, name: str | None) -> None:
    if name is None:
        raise UserError(f"--tokenizer-model is missing: --tokenizer-type {kind} reads it")
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in _HUB_FILES):
            raise FileNotFoundError(
                f"--tokenizer-model is {name}: that folder has none of {', '.join(_HUB_FILES)}; "
                f"it must be that of a tokenizer, {_ADVICE}"
            )
        return
    reason = _why_out_of_reach(name)
    if reason is not None:
        raise FileNotFoundError(
            f"--tokenizer-model is {name}: there is no such folder, and {reason}; {_ADVICE}"
        )


def _why_out_of_reach(name: str) -> str | None:
    """Return why a repository of the hub cannot be had, or None if it was downloaded or can be."""
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ImportError:
        return "to look for it on the Hugging Face hub needs the package huggingface_hub"
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _HUB_FILES):
            return None
        HfApi().model_info(name, timeout=_TIMEOUT)
    except Exception as error:  # of requests, httpx or the hub's own kind, by version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the Hugging Face hub does not give it ({reason})"
    return None
