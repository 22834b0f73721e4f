# SPDX-License-Identifier: Apache-2.0
"""Writes what is new in an export: its safetensors files, and its model card.

Bytes of weights are written as they come: the safetensors library's own writer holds a whole file
in memory. The card says which inference engines read the RoPE of the export.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_cream import __version__
from megatron_cream.checkpoint.hf_folder import DTYPES, INDEX, SINGLE
from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.rope import RopeScaling, hf_rope_fields

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def cut_into_shards(tensors: list[TensorPlan], most_bytes: int) -> list[list[TensorPlan]]:
    """Cut a list of tensors, in its order, into shards of at most ``most_bytes``.

    A tensor that is larger gets a shard of its own.
    """
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    tensors: list[TensorPlan],
    most_bytes: int,
    blocks: Iterator[np.ndarray],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Write planned tensors, in their order, into the files that transformers looks for.

    Args:
        folder: where the files go.
        tensors: in the order in which their bytes come.
        most_bytes: size of a file that is not exceeded, headers not counted.
        blocks: contiguous uint8 memory; each is used before the next one is asked for, and none
            has bytes of two tensors.
        on_bytes: called with the bytes of each block that was written.

    Raises:
        RuntimeError: there are fewer bytes than planned.
    """
    shards = cut_into_shards(tensors, most_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        left = sum(tensor.nbytes for tensor in shard)
        with (folder / name).open("wb", buffering=0) as file:
            _write(file.fileno(), memoryview(_header(shard)))
            while left > 0 and (block := next(blocks, None)) is not None:
                _write(file.fileno(), memoryview(block))
                left -= block.nbytes
                on_bytes(block.nbytes)
            if left:
                raise RuntimeError(f"{folder / name}: {left} bytes of its tensors were not written")
            os.fsync(file.fileno())
    if len(shards) > 1:
        where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]


def _header(tensors: list[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def parse_bytes(text: str) -> int:
    """Return the bytes of a size like 500MB.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9})\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: it must be a size such as 500MB or 5GB")
    return int(found[1]) * 1000 ** ("KMG".index(found[2][0].upper()) + 1)


YES = "yes"
"""Logits are those that the model was trained with."""

REFUSED = "refused"
"""Loading or conversion ends with an error."""

IGNORED = "ignored"
"""Loads without an error and turns positions otherwise: wrong answers."""

UNKNOWN = "not tried"

ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope", "proportional")
"""Values of rope_type in an export. ``default`` are also ntk and another theta, ``longrope`` also
yarn-pose, trained frequencies and an interpolation on top of another one."""


@dataclass(frozen=True)
class InferenceEngine:
    """An inference engine.

    Attributes:
        name: as its own project writes it.
        known: ``run`` by ``tests/engines``, ``run once`` by hand, or ``read in source``.
        reads: what it does with each of ``ROPE_TYPES``, in their order.
        note: what a user must know beside that, or an empty string.
    """

    name: str
    known: str
    reads: tuple[str, ...]
    note: str = ""

    def of(self, rope_type: str) -> str:
        """Return what the engine does with a ``rope_type``."""
        return self.reads[ROPE_TYPES.index(rope_type)]


_YARN = "it computes yarn's attention factor itself"
# fmt: off
ENGINES = (
    InferenceEngine("transformers 5", "run", (YES,) * 6),
    InferenceEngine("transformers 4.57", "run", (YES, YES, YES, YES, YES, REFUSED)),
    InferenceEngine("vLLM", "read in source", (YES, YES, YES, YES, YES, REFUSED),
                    "with longrope every sequence gets the long list once --max-model-len is more "
                    f"than the original window; {_YARN}"),
    InferenceEngine("SGLang", "read in source", (YES,) * 6, _YARN),
    InferenceEngine("llama.cpp", "run", (YES, YES, YES, YES, IGNORED, IGNORED),
                    "its converter writes down longrope for a Llama without the lists"),
    InferenceEngine("CTranslate2", "run", (YES, YES, REFUSED, IGNORED, REFUSED, REFUSED)),
    InferenceEngine("ONNX Runtime GenAI", "run once", (YES, IGNORED, IGNORED, *[UNKNOWN] * 3),
                    "newer versions divide by the factor of linear: compare before you serve"),
    InferenceEngine("litgpt", "run once", (IGNORED,) * 6,
                    "takes RoPE from its own table of models by name, and not from config.json"),
)
# fmt: on


def engines_by_answer(rope_type: str) -> dict[str, list[str]]:
    """Return the engines by what they do with a ``rope_type``, in the order of ``ENGINES``."""
    found: dict[str, list[str]] = {YES: [], REFUSED: [], IGNORED: [], UNKNOWN: []}
    for engine in ENGINES:
        found[engine.of(rope_type)].append(engine.name)
    return {answer: names for answer, names in found.items() if names}


def describe_engines(rope_type: str) -> str:
    """Say in one line who reads an export whose config.json has this ``rope_type``."""
    said = {
        YES: "is read by",
        REFUSED: "refused by",
        IGNORED: "silently ignored (wrong answers) by",
        UNKNOWN: "not tried with",
    }
    parts = [
        f"{said[how]} {', '.join(names)}" for how, names in engines_by_answer(rope_type).items()
    ]
    return f"rope_type {rope_type} {'; '.join(parts)}"


_HOW = {
    "cream": "CREAM (arXiv:2406.07138)",
    "pose": "PoSE (arXiv:2309.10400)",
    "randpos": "RandPos (arXiv:2305.16843)",
    "scatter": "scattered chunks",
    "full": "plain positions",
}


@dataclass(frozen=True)
class SourceModel:
    """The model that was extended: its name, a repository or a folder, and its window."""

    name: str
    window: int


def model_card(
    base: SourceModel | None,
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
    fields = hf_rope_fields(scaling, extension.target_length)["rope_parameters"]
    window = extension.target_length
    return _CARD.format(
        base_line=f"base_model: {base.name}\n" if base and "/" in base.name else "",
        name=base.name if base else shape.architecture,
        history=_history(base, extension),
        architecture=shape.architecture,
        window=window,
        extension=extension,
        rope=json.dumps(fields),
        mixed=f"; within {extension.original_length} tokens the RoPE of the model before"
        if extension.mixed_windows
        else "",
        dtype=dtype,
        attention=f"| attention | to the last {shape.window} tokens |\n" if shape.window else "",
        version=__version__,
        engines=describe_engines(fields["rope_type"]),
    )


_CARD = """\
---
{base_line}library_name: transformers
pipeline_tag: text-generation
---

# {name}, {window} tokens

{history}

| | |
| --- | --- |
| architecture | {architecture} |
| window | {window} tokens |
| tokens per training sample | {extension.train_length} |
| positions of training samples | {extension.position_strategy} |
| RoPE interpolation | {extension.rope_interpolation}, factor {extension.rope_factor:g} over \
{extension.original_length} tokens{mixed} |
| RoPE in config.json | `{rope}` |
| weights | {dtype} |
{attention}| exported by | megatron_cream {version} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Positions beyond the base model's window are right only where the inference engine reads the RoPE \
settings of config.json: {engines}.

`vllm serve PATH --max-model-len {window}` or `python -m sglang.launch_server --model-path PATH \
--context-length {window}` serves it at its full window.
"""


def _history(base: SourceModel | None, extension: ExtensionConfig) -> str:
    window = extension.target_length
    if base is None:
        return f"Trained from scratch with Megatron-Core, with a window of {window} tokens."
    if base.window == window and extension.position_strategy == "full":
        return f"`{base.name}`, with its window of {window} tokens."
    how = _HOW.get(extension.position_strategy, extension.position_strategy)
    return (
        f"`{base.name}`, extended from {base.window} to {window} tokens with {how}, trained on "
        f"{extension.train_length} tokens at a time."
    )
