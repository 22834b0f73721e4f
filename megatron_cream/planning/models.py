# SPDX-License-Identifier: Apache-2.0
"""The models that people extend, Megatron's flags for them, and the bytes they need per GPU.

Memory is for bf16 training with the distributed optimizer, Transformer Engine's fused layers, flash
attention and no dropout. Megatron has an estimator of its own (``megatron.training
.theoretical_memory_usage``). Its 6 + 12 / DP bytes per parameter are the same as here; its
parameters leave out biases and uneven stages, and its optimizer is not divided by the context
parallel size, over which Megatron does shard it. Its activations are those of arXiv:2205.05198,
table 2, whose MLP is not gated: a SwiGLU layer keeps 6 f bytes per token and not 4 f. So
activations are counted tensor by tensor; docs/planning.md has them next to a GPU's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
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
from megatron_cream.errors import UserError, naming
from megatron_cream.options import read_object
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
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
    _llama("mixtral-8x7b",      32, 4096, 14336, 32, 8,  128, 32000,  32768,  1e6,   1e-5,
           architecture="MixtralForCausalLM", experts=8, experts_per_token=2),
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
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
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
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
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


GIB = 2**30
VOCAB_MULTIPLE = 128
"""Megatron's --make-vocab-size-divisible-by; it pads to that times the tensor parallel size."""

WEIGHT = 2
"""Bytes per parameter: bf16. Gradients and optimizer are as ``Tuning`` says."""

SAVED = 14
"""Bytes per parameter of a checkpoint: bf16 weight, fp32 copy and two moments."""

FP8_COPIES = 2
"""Bytes per parameter of a layer's products beside bf16: a weight and its transpose in FP8."""

RESERVE_GIB = 5.0
"""Left free: CUDA context, NCCL's buffers, workspaces and the allocator's fragmentation.

Measured on one H200 as what PyTorch reserves above what it has allocated at the peak: 1.6 to 4.1.
"""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        weights, gradients, optimizer: what stays.
        activations: what layers keep between forward and backward, all micro-batches in flight.
        working: the peak above these: the logits and their softmax, or one layer's backward.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """Return the rows of the embedding that Megatron makes for a tensor parallel size."""
    multiple = VOCAB_MULTIPLE * tensor
    return math.ceil(shape.vocabulary / multiple) * multiple


def layer_matrices(shape: ModelShape) -> int:
    """Return the parameters of one layer that tensor parallelism divides, biases of q, k, v too."""
    qkv = (shape.heads + 2 * shape.groups) * shape.head_dim
    attention = qkv * shape.hidden + shape.heads * shape.head_dim * shape.hidden
    feed_forward = 0 if shape.experts else 3 * shape.hidden * shape.ffn
    return attention + feed_forward + (qkv if shape.qkv_bias else 0)


def expert_matrices(shape: ModelShape) -> int:
    """Return the parameters of all experts of one layer, which expert parallelism divides."""
    return (shape.experts or 0) * 3 * shape.hidden * shape.ffn


def layer_norms(shape: ModelShape) -> int:
    """Return the parameters of one layer that every rank has whole: norms, and a router."""
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    return norms + (shape.experts or 0) * shape.hidden


def dense_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the parameters on each GPU of a pipeline stage that are no experts'."""
    layers = layout.layers_of(stage, shape.layers)
    matrices = layers * layer_matrices(shape)
    norms = layers * layer_norms(shape)
    table = padded_vocab(shape, layout.tensor) * shape.hidden
    last = stage == layout.pipeline - 1
    matrices += table if stage == 0 else 0
    # A tied output layer on another stage than the embedding is a copy of it.
    matrices += table if last and (not shape.tied or layout.pipeline > 1) else 0
    return matrices // layout.tensor + norms + (shape.hidden if last else 0)


def expert_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the parameters of experts on each GPU of a pipeline stage."""
    return layout.layers_of(stage, shape.layers) * expert_matrices(shape) // layout.expert


def stage_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Return the parameters on each GPU of a pipeline stage; padding of the vocabulary counts."""
    return dense_parameters(shape, layout, stage) + expert_parameters(shape, layout, stage)


def largest_stage(shape: ModelShape, layout: ParallelLayout) -> int:
    """Return the pipeline stage each of whose GPUs has most parameters."""
    return max(layout.telling_stages, key=lambda stage: stage_parameters(shape, layout, stage))


def layer_activations(shape: ModelShape, tensor: int = 1, fp8: bool = False) -> float:
    """Return the bytes per token that one layer keeps for its backward pass.

    Inputs and outputs of both norms 8 h; queries and the output of attention 4 a d; keys and
    values 4 g d; log-sum-exp of attention 4 a; gate and up projection and their product 6 f.
    Tensor parallelism divides all of it, because sequence parallelism goes with it. In FP8 the
    inputs of the four products have 1 byte: outputs of the norms and that of the MLP's gate need
    no other copy, the output of attention is kept in bf16 as well. Each of the experts that a token
    goes to keeps what an MLP does, and its input, 2 h; all experts are taken to get as many tokens.
    """
    attention = shape.head_dim * (4 * shape.heads + 4 * shape.groups) + 4 * shape.heads
    mlp, moved = 6 * shape.ffn, 0
    if shape.experts_per_token:
        mlp, moved = shape.experts_per_token * mlp, shape.experts_per_token * 2 * shape.hidden
    kept: float = 8 * shape.hidden + attention + mlp + moved
    if fp8:
        kept += shape.head_dim * shape.heads - 2 * shape.hidden - mlp / 6 - moved / 2
    return kept / tensor


def output_activations(shape: ModelShape, tensor: int = 1) -> float:
    """Return the bytes per token of the last norm and of logits in bf16 and softmax in fp32."""
    logits = 6 * padded_vocab(shape, tensor) / tensor
    return 4 * shape.hidden / tensor + logits


def stage_memory(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    stage: int,
    parameters: int | None = None,
    tuning: Tuning = MEGATRON_DEFAULTS,
) -> StageMemory:
    """Return what a GPU of pipeline stage ``stage`` (from 0) needs under Megatron's schedules.

    Args:
        parameters: on that GPU, where they are known better than ``stage_parameters``.
    """
    experts = expert_parameters(shape, layout, stage)
    if parameters is None:
        parameters = dense_parameters(shape, layout, stage) + experts
    layers = layout.layers_of(stage, shape.layers)
    tokens = work.seq_length * work.micro_batch // layout.context
    in_flight = layout.in_flight(work, stage)
    whole = layer_activations(shape, layout.tensor, tuning.fp8)
    again = layout.recomputed(layers)
    kept = again * 2 * shape.hidden / layout.tensor + (1 - again) * whole
    # Backward of a layer: gradients of what it kept, which recomputation makes first.
    working = 2 * whole if again else whole
    if stage == layout.pipeline - 1:
        working = max(working, output_activations(shape, layout.tensor))
    copies = layers * layer_matrices(shape) / layout.tensor + experts if tuning.fp8 else 0
    shared = (parameters - experts) / (layout.data * layout.context)
    return StageMemory(
        weights=WEIGHT * parameters + FP8_COPIES * copies,
        gradients=parameters * tuning.gradient_bytes,
        optimizer=tuning.optimizer_bytes * (shared + experts / layout.expert_copies),
        activations=tokens * in_flight * layers * kept,
        working=tokens * working,
    )


def peak_memory(
    shape: ModelShape, layout: ParallelLayout, work: Workload, tuning: Tuning = MEGATRON_DEFAULTS
) -> StageMemory:
    """Return the memory of the stage that needs most."""
    stages = (
        stage_memory(shape, layout, work, stage, tuning=tuning) for stage in layout.telling_stages
    )
    return max(stages, key=lambda memory: memory.total)
