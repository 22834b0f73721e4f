# SPDX-License-Identifier: Apache-2.0
"""Finds the model that is extended, by name or config.json, and Megatron's flags for it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint.model_shape import (
    ModelShape,
    kind_flags,
    shape_from_config,
    size_flags,
    window_of,
)
from megatron_cream.checkpoint.weight_map import FAMILIES
from megatron_cream.errors import UserError, naming
from megatron_cream.options import read_object
from megatron_cream.rope.huggingface import scaling_from_hf


@dataclass(frozen=True, kw_only=True)
class BaseModel(ModelShape):
    """A model that people extend: its shape, and the window and angles it was released with.

    Attributes:
        trained_length: tokens that the model was trained at.
        theta: base of the rotary frequencies.
        rope_type: interpolation that the model was already released with; ``default`` for none.
        rope_factor: its factor.
        rope_original: window in tokens that its factor counts from.
    """

    name: str
    trained_length: int
    theta: float
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original: int = 0


_COLUMNS = (
    *("name", "layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocabulary"),
    *("trained_length", "theta", "norm_epsilon"),
)


def _llama(*values: Any, **more: Any) -> BaseModel:
    given = dict(zip(_COLUMNS, values, strict=True))
    family: dict[str, Any] = {"architecture": "LlamaForCausalLM", "tied": False} | more
    return BaseModel(**given, **family)


def _mistral(*values: Any) -> BaseModel:
    return _llama(*values, architecture="MistralForCausalLM")


def _qwen(*values: Any) -> BaseModel:
    return _llama(*values, architecture="Qwen2ForCausalLM", qkv_bias=True)


_LLAMA3 = {"rope_type": "llama3", "rope_factor": 8.0, "rope_original": 8192}

# fmt: off
_TABLE = [
    #      name                 L   h     f      a   g   d    vocab   window  theta  eps
    _llama("smollm2-135m",      30, 576,  1536,  9,  3,  64,  49152,  8192,   1e5,   1e-5,
           tied=True),
    _llama("llama-2-7b",        32, 4096, 11008, 32, 32, 128, 32000,  4096,   1e4,   1e-5),
    _llama("llama-2-13b",       40, 5120, 13824, 40, 40, 128, 32000,  4096,   1e4,   1e-5),
    _llama("llama-2-70b",       80, 8192, 28672, 64, 8,  128, 32000,  4096,   1e4,   1e-5),
    _llama("codellama-34b",     48, 8192, 22016, 64, 8,  128, 32000,  16384,  1e6,   1e-5),
    _llama("llama-3-8b",        32, 4096, 14336, 32, 8,  128, 128256, 8192,   5e5,   1e-5),
    _llama("llama-3-70b",       80, 8192, 28672, 64, 8,  128, 128256, 8192,   5e5,   1e-5),
    _llama("llama-3.1-8b",      32, 4096, 14336, 32, 8,  128, 128256, 131072, 5e5,   1e-5,
           **_LLAMA3),
    _llama("llama-3.1-70b",     80, 8192, 28672, 64, 8,  128, 128256, 131072, 5e5,   1e-5,
           **_LLAMA3),
    # Version 0.1 has a sliding window of 4096 tokens, which longer positions cannot extend.
    _mistral("mistral-7b-v0.2", 32, 4096, 14336, 32, 8,  128, 32000,  32768,  1e6,   1e-5),
    _mistral("mistral-7b-v0.3", 32, 4096, 14336, 32, 8,  128, 32768,  32768,  1e6,   1e-5),
    # Base models; trained at 32768 tokens (arXiv:2412.15115), whatever their config.json allows.
    _qwen("qwen2.5-7b",         28, 3584, 18944, 28, 4,  128, 152064, 32768,  1e6,   1e-6),
    _qwen("qwen2.5-14b",        48, 5120, 13824, 40, 8,  128, 152064, 32768,  1e6,   1e-5),
    _qwen("qwen2.5-32b",        64, 5120, 27648, 40, 8,  128, 152064, 32768,  1e6,   1e-5),
    _qwen("qwen2.5-72b",        80, 8192, 29568, 64, 8,  128, 152064, 32768,  1e6,   1e-5),
]
# fmt: on
MODELS: dict[str, BaseModel] = {model.name: model for model in _TABLE}

_ALIASES = {
    "mistral-7b": "mistral-7b-v0.3",
    "llama-2-34b": "codellama-34b",
    "llama-34b": "codellama-34b",
    "code-llama-34b": "codellama-34b",
}
_ON_THE_HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "mistral-7b-v0.2": "mistral-community/Mistral-7B-v0.2",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
}
"""Repository of each model's base weights."""

_SUFFIXES = re.compile(r"-(hf|chat|base|instruct|python)$")


def find_model(name: str) -> BaseModel:
    """Return a model by name, or out of a folder with a config.json.

    Names are taken as people type them: ``meta-llama/Llama-2-7b-hf`` is ``llama-2-7b``.

    Raises:
        UserError: an unknown name, naming what is known, or a config.json that cannot be served.
        FileNotFoundError: a folder without a config.json.
    """
    folder = Path(name)
    if folder.is_dir():
        return _from_folder(folder)
    plain = _plain_name(name)
    plain = _ALIASES.get(plain, plain)
    if plain in MODELS:
        return MODELS[plain]
    near = difflib.get_close_matches(plain, MODELS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"MODEL is {name!r}: {hint}it must be a folder with a config.json or one of "
        f"{', '.join(MODELS)}"
    )


def hub_name(name: str) -> str:
    """Return where the weights of ``find_model(name)`` are: a repository, or the folder itself."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return name if "/" in name else _ON_THE_HUB[find_model(name).name]


def title_of(hf: str) -> str:
    """Return what people call a model of the hub: ``meta-llama/Llama-2-7b-hf`` is Llama-2-7B."""
    plain = re.sub(r"(\d)b\b", r"\1B", hf.rsplit("/", 1)[-1])
    return plain.removesuffix("-hf").removeprefix("Meta-")


def _plain_name(name: str) -> str:
    plain = name.rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    plain = re.sub(r"^meta-", "", plain)
    plain = re.sub(r"^llama-?(\d)", r"llama-\1", plain)
    while _SUFFIXES.search(plain):
        plain = _SUFFIXES.sub("", plain)
    return plain


def _from_folder(folder: Path) -> BaseModel:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"MODEL is {folder}: it must have a config.json")
    config = read_object(path)
    with naming(folder):
        return model_from_hf(config, folder.resolve().name)


def model_from_hf(config: dict[str, Any], name: str) -> BaseModel:
    """Return the model that a Hugging Face ``config.json`` describes.

    Raises:
        UserError: a model that cannot be built, or one that the closed forms do not hold for, or
            an unknown interpolation.
    """
    shape = shape_from_config(config)
    _validate_plannable(shape)
    scaling = scaling_from_hf(config)
    released_with: dict[str, Any] = {
        "rope_type": scaling.name,
        "rope_factor": scaling.factor,
        "rope_original": scaling.original_length,
    }
    return BaseModel(
        **{field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)},
        name=name,
        trained_length=window_of(config),
        theta=scaling.base,
        **({} if scaling.name == "none" else released_with),
    )


def _validate_plannable(shape: ModelShape) -> None:
    if shape.experts:
        dense = [name for name, family in FAMILIES.items() if not family.experts]
        raise UserError(
            f"architecture in config.json is {shape.architecture}: it must be one of "
            f"{', '.join(dense)}"
        )
    if shape.window is not None:
        raise UserError(
            f"sliding_window in config.json is {shape.window}: it must be off, tokens further "
            "apart never see each other"
        )
    if shape.linear_bias:
        raise UserError("attention_bias in config.json is True: it must be off")


def megatron_flags(model: BaseModel) -> list[list[str]]:
    """Return the flags that make Megatron build ``model``, one list per theme.

    Vocabulary and window are not among them: they belong to the data and to the run.
    """
    rotary = ["--position-embedding-type", "rope", "--rotary-base", f"{model.theta:.0f}"]
    return [size_flags(model), kind_flags(model), rotary]
