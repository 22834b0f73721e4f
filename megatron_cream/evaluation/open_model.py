# SPDX-License-Identifier: Apache-2.0
"""Opens what is evaluated: a model, with another RoPE if asked; its tokenizer; documents."""

from __future__ import annotations

import dataclasses
import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.attention.methods import attention_choice
from megatron_cream.checkpoint.hf_files import find_kept_files
from megatron_cream.checkpoint.iterations import find_checkpoint, read_saved_arguments
from megatron_cream.config import ExtensionConfig, rope_settings, saved_extension
from megatron_cream.corpus.input_files import find_inputs
from megatron_cream.corpus.readers import read_documents as read_texts
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.forward import ScoringModel
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.json_values import naming, read_object
from megatron_cream.parallel_layout import ParallelLayout
from megatron_cream.rope import SCALINGS, hf_rope_fields, scaling_from_hf
from megatron_cream.rope.flags import options_from_args

_LONGEST = 2**40  # tokens


def open_model(settings: EvaluationSettings) -> ScoringModel:
    """Load the model of --checkpoint or --hf.

    Raises:
        UserError, FileNotFoundError, ImportError: a model that cannot be scored.
    """
    if settings.hf is not None:
        from megatron_cream.evaluation.hf_model import HuggingFaceModel

        rope = changed_fields(settings, Path(settings.hf))
        model: Any = HuggingFaceModel(settings.hf, settings.dtype, rope=rope)
        return _beyond_window(settings, model)
    validate_gpu()
    from megatron_cream.evaluation.megatron_model import MegatronModel

    layout = ParallelLayout(
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.context_parallel_size,
    )
    path = str(settings.checkpoint)
    return _beyond_window(settings, MegatronModel(path, changed_extension(settings, path), layout))


def _beyond_window(settings: EvaluationSettings, model: Any) -> ScoringModel:
    """Give a model the attention that is asked for, and note it with the results."""
    choice = attention_choice(settings)
    if choice is not None:
        longest = max(settings.lengths or [model.window])
        sizes = choice.sizes(model.window, longest, model.dual_chunk)
        bands = choice.bands(sizes)
        model.attend_beyond_window(bands, choice.flag)
        model.settings["attention"] = {"name": choice.name, **sizes}
    return model


def validate_gpu(flag: str = "--cpu") -> None:
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


def result_header(settings: EvaluationSettings, model: ScoringModel, task: str) -> dict[str, Any]:
    """Return what decides the results of a task, besides the task's own options.

    Not the lengths: a run may be continued with more of them.
    """
    return {
        "task": task,
        "name": settings.name or Path(model.name).name,
        "model": model.name,
        "window": model.window,
        "weights": hash_files(model.name),
        **model.settings,
    }


def hash_files(path: str) -> str:
    """Return a hash of names, sizes and dates of a model's files.

    A run is not continued with other weights under the same name.
    """
    root = Path(path)
    folder = root if (root / "config.json").is_file() else find_checkpoint(path)
    found = sorted((folder or root).glob("*"))
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def changed_extension(settings: EvaluationSettings, checkpoint: str) -> ExtensionConfig | None:
    """Return what to evaluate a checkpoint with where the RoPE asked for is not its own.

    The window is, as in ``changed_fields``, that of the model before any interpolation, times
    the factor.

    Raises:
        UserError: settings that do not go together.
    """
    changes = _changes(settings)
    saved = read_saved_arguments(checkpoint) if changes else None
    extension = saved_extension(saved) if saved is not None else None
    return None if extension is None else _changed(extension, changes)


def changed_fields(settings: EvaluationSettings, folder: Path) -> dict[str, Any] | None:
    """Return the fields of config.json to evaluate ``folder`` with where they are not its own.

    The window is that of the model before any interpolation, times --rope-factor.

    Raises:
        UserError: settings that do not go together, or a config.json that cannot be changed.
    """
    changes, path = _changes(settings), folder / "config.json"
    if not changes or not path.is_file():  # a folder without one is refused where it is loaded
        return None
    config = read_object(path)
    if "text_config" in config:
        raise UserError(
            f"--hf is {folder}: its config.json has a text_config, whose RoPE cannot be changed "
            "here; leave out the flags of RoPE"
        )
    name = changes.get("rope_interpolation")
    if name in SCALINGS and SCALINGS[name].trained_by:
        raise UserError(
            f"--rope-interpolation is {name} with --hf: its angles are trained; evaluate a "
            "checkpoint that was, or its export"
        )
    with naming(folder):
        own = scaling_from_hf(config)
    window = own.original_length
    plain = ExtensionConfig(train_length=window, **{"target_length": window, **rope_settings(own)})
    extension = _changed(plain, changes)
    scaling = extension.scaling(own.dim)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return hf_rope_fields(scaling, extension.target_length, head_dim)


def _changes(settings: EvaluationSettings) -> dict[str, Any]:
    changes = {
        field: value
        for field in ("rope_interpolation", "rope_factor", "rope_theta")
        if (value := getattr(settings, field)) is not None
    }
    if options := options_from_args(Namespace(**vars(settings))):
        changes["rope_options"] = options
    return changes


def _changed(extension: ExtensionConfig, changes: dict[str, Any]) -> ExtensionConfig:
    name = changes.get("rope_interpolation", extension.rope_interpolation)
    if name != extension.rope_interpolation:
        # What belongs to the model's own interpolation means nothing to another.
        changes = {"rope_options": {}, "rope_theta": None, "mixed_windows": False, **changes}
    found = dataclasses.replace(extension, **changes)
    if name == "none" and found.rope_factor != 1:
        raise UserError(
            f"--rope-factor is {found.rope_factor:g}: without an interpolation it changes nothing; "
            "name one with --rope-interpolation"
        )
    if found.rope_factor == 1 and "rope_factor" not in changes and SCALINGS[name].by_factor:
        raise UserError(
            f"--rope-factor is not given: the model's own is 1, with which {name} changes nothing; "
            "it must be how many times longer its window becomes"
        )
    return _reaching(found)


def _reaching(found: ExtensionConfig) -> ExtensionConfig:
    """Return the settings with the window that they reach; of drawn scales the trained one."""
    if found.draws_scales:
        return found
    if not found.original_length * found.rope_factor <= _LONGEST:
        raise UserError(
            f"--rope-factor is {found.rope_factor:g}: {found.original_length} tokens times it must "
            f"be at most {_LONGEST}"
        )
    window = round(found.original_length * found.rope_factor)
    # Positions of training samples would be checked against the new window, and are not used.
    return dataclasses.replace(
        found,
        position_strategy="full",
        position_options={},
        train_length=window,
        target_length=window,
    )


def open_tokenizer(settings: EvaluationSettings) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer, and the folder or file it came from.

    Without --tokenizer-type it is the one in the Hugging Face folder, or the one that a trained
    checkpoint says it was trained with, or, as in an export, the one that the import keeps which
    the run goes back to.

    Raises:
        UserError, FileNotFoundError: none there, or one that cannot be read.
    """
    if settings.tokenizer_type is not None:
        path = settings.tokenizer_model
        return load_tokenizer(settings.tokenizer_type, path), path
    if settings.hf:
        return _tokenizer_in(Path(settings.hf), f"in {settings.hf}")
    checkpoint = str(settings.checkpoint)
    saved = read_saved_arguments(checkpoint)
    kind, path = (getattr(saved, name, None) for name in ("tokenizer_type", "tokenizer_model"))
    if kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer") and path and Path(path).exists():
        return load_tokenizer(kind, path), path
    try:
        kept = find_kept_files(checkpoint, saved) if saved is not None else None
    except FileNotFoundError:
        kept = None
    return _tokenizer_in(kept, f"beside {checkpoint} or the import that it goes back to")


def _tokenizer_in(folder: Path | None, where: str) -> tuple[Tokenizer, str]:
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


def open_prompt(settings: EvaluationSettings) -> Prompt:
    """Return the tokenizer in the asked style.

    Raises:
        UserError, FileNotFoundError: as ``open_tokenizer``, or no such style.
    """
    tokenizer, source = open_tokenizer(settings)
    return Prompt(tokenizer, settings.prompt, settings.bos, source)


def validate_vocabulary(tokenizer: Tokenizer, model: ScoringModel) -> None:
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


def open_documents(settings: EvaluationSettings, model: ScoringModel) -> list[np.ndarray]:
    """Return ``documents`` documents ``[tokens_per_document]`` out of --data.

    It is an indexed dataset, or text that the model's tokenizer encodes.

    Raises:
        UserError, FileNotFoundError: no such data, or too little of it, or not the model's tokens.
    """
    data, tokens = str(settings.data), settings.tokens_per_document
    if Path(f"{data}.idx").exists() or not Path(data).exists():
        skip = settings.skip_documents
        documents = read_first_tokens(data, settings.documents, tokens, skip)
    else:
        documents = _encode_texts(settings, data, model, tokens)
    if (lowest := min(int(document.min()) for document in documents)) < 0:
        raise UserError(f"--data is {data}: it has token {lowest}, which is no token")
    highest = max(int(document.max()) for document in documents)
    if highest >= model.vocabulary:
        raise UserError(
            f"--data is {data}: it has token {highest}, the model's vocabulary has "
            f"{model.vocabulary}; it must be written with the model's tokenizer"
        )
    return documents


def read_first_tokens(prefix: str, count: int, tokens: int, skip: int = 0) -> list[np.ndarray]:
    """Return the first ``tokens`` tokens of ``count`` documents that have as many.

    The documents are spread evenly over those that are long enough, in order; the first ``skip`` of
    the dataset are passed over.

    Raises:
        UserError: fewer than ``count`` documents are long enough.
    """
    index = read_index(prefix)
    lengths = index.lengths[skip:]
    eligible = skip + np.flatnonzero(lengths >= tokens)
    if len(eligible) < count:
        longest = int(lengths.max(initial=0))
        raise UserError(
            f"--data is {prefix}: {len(eligible)} of its documents have {tokens} tokens (the "
            f"longest has {longest}), --documents asks for {count}; take fewer or shorter ones "
            "(--document-tokens)"
        )
    chosen = eligible[np.linspace(0, len(eligible) - 1, count).round().astype(int)]
    data = np.memmap(prefix + ".bin", mode="r", dtype=index.dtype)
    starts = index.pointers[chosen] // index.dtype.itemsize
    return [np.array(data[start : start + tokens]) for start in starts]


def _encode_texts(
    settings: EvaluationSettings, data: str, model: ScoringModel, tokens: int
) -> list[np.ndarray]:
    tokenizer, _ = open_tokenizer(settings)
    validate_vocabulary(tokenizer, model)
    documents: list[np.ndarray] = []
    longest = 0
    for path in find_inputs([data]).files:
        for text in read_texts(path):
            ids = tokenizer.encode([text[: 32 * tokens]])[0]
            longest = max(longest, len(ids))
            if len(ids) >= tokens:
                documents.append(ids[:tokens])
            if len(documents) == settings.documents:
                return documents
    raise UserError(
        f"--data is {data}: {len(documents)} of its texts have {tokens} tokens (the longest "
        f"has {longest}), --documents asks for {settings.documents}; take fewer or shorter ones "
        "(--document-tokens)"
    )
