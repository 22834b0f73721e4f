# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: what it is, how it was extended, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_cream.checkpoint.inference_engines import sentence
from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.config import ExtensionConfig
from megatron_cream.rope import RopeScaling, hf_rope_fields

_HOW = {
    "cream": "CREAM (arXiv:2406.07138)",
    "pose": "PoSE (arXiv:2309.10400)",
    "randpos": "RandPos (arXiv:2305.16843)",
    "full": "plain positions",
}


@dataclass(frozen=True)
class Base:
    """The model that was extended: its name, a repository or a folder, and its window."""

    name: str
    window: int


def model_card(
    base: Base | None,
    shape: ModelShape,
    extension: ExtensionConfig,
    dtype: str,
    scaling: RopeScaling | None = None,
) -> str:
    """Return README.md.

    Args:
        base: None if the model was trained from scratch.
        dtype: type of the weights, as transformers calls it.
        scaling: what config.json says, where it is not what the settings say alone.
    """
    scaling = scaling or extension.scaling(shape.head_dim)
    fields = hf_rope_fields(scaling, extension.target_length)
    rope, rope_type = json.dumps(fields["rope_parameters"]), fields["rope_parameters"]["rope_type"]
    window = extension.target_length
    lines = [
        "---",
        *([f"base_model: {base.name}"] if base and "/" in base.name else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {base.name if base else shape.architecture}, {window} tokens",
        "",
        *_history(base, extension),
        "",
        "| | |",
        "| --- | --- |",
        f"| architecture | {shape.architecture} |",
        f"| window | {window} tokens |",
        *_training(extension),
        f"| RoPE in config.json | `{rope}` |",
        f"| weights | {dtype} |",
        *_attention(shape),
        f"| exported by | megatron_cream {_version()} |",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        "Positions beyond the base model's window are right only where the inference engine reads "
        f"the RoPE settings of config.json: {sentence(rope_type)}.",
        "",
        f"`vllm serve PATH --max-model-len {window}` or `python -m sglang.launch_server "
        f"--model-path PATH --context-length {window}` serves it at its full window.",
        "",
    ]
    return "\n".join(lines)


def _history(base: Base | None, extension: ExtensionConfig) -> list[str]:
    window = extension.target_length
    if base is None:
        return [f"Trained from scratch with Megatron-Core, with a window of {window} tokens."]
    if base.window == window and extension.position_strategy == "full":
        return [f"`{base.name}`, with its window of {window} tokens."]
    how = _HOW.get(extension.position_strategy, extension.position_strategy)
    return [
        f"`{base.name}`, extended from {base.window} to {window} tokens with {how}, trained on "
        f"{extension.train_length} tokens at a time."
    ]


def _training(extension: ExtensionConfig) -> list[str]:
    return [
        f"| tokens of a training sample | {extension.train_length} |",
        f"| positions of training samples | {extension.position_strategy} |",
        f"| RoPE interpolation | {extension.rope_interpolation}, factor {extension.rope_factor:g} "
        f"over {extension.original_length} tokens |",
    ]


def _attention(shape: ModelShape) -> list[str]:
    return [] if shape.window is None else [f"| attention | to the last {shape.window} tokens |"]


def _version() -> str:
    try:
        return version("megatron_cream")
    except PackageNotFoundError:
        return "(not installed)"
