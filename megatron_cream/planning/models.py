# SPDX-License-Identifier: Apache-2.0
"""Shapes of the models that people extend, and Megatron's flags for them."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A decoder with RoPE, RMSNorm and SwiGLU, as its config.json describes it.

    Attributes:
        layers: L, transformer layers.
        hidden: h.
        ffn: f, width of the gated feed-forward part.
        heads: a, attention heads.
        kv_heads: g, key and value heads (query groups).
        head_dim: d.
        vocab: rows of the embedding, without Megatron's padding.
        window: tokens that the model was trained at.
        theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        tied: the output layer is the embedding.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are normalised per head.
        rope_type: interpolation that the model was already released with; ``default`` for none.
        rope_factor: its factor.
        rope_original: window in tokens that its factor counts from.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    theta: float
    norm_eps: float
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original: int = 0

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer that tensor parallelism divides, biases of q, k, v included."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = qkv * self.hidden + self.heads * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.ffn + (qkv if self.qkv_bias else 0)

    @property
    def layer_norms(self) -> int:
        """Parameters of one layer that every tensor-parallel rank has whole."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def parameters(self) -> int:
        """All parameters, as a Hugging Face checkpoint of the model has them."""
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * (self.layer_matrices + self.layer_norms) + self.hidden + tables


_LLAMA3 = {"rope_type": "llama3", "rope_factor": 8.0, "rope_original": 8192}
_QWEN = {"qkv_bias": True}

# fmt: off
_TABLE = [
    #           name              L   h     f      a   g   d    vocab   window  theta  eps
    ModelShape("smollm2-135m",    30, 576,  1536,  9,  3,  64,  49152,  8192,   1e5,   1e-5,
               tied=True),
    ModelShape("llama-2-7b",      32, 4096, 11008, 32, 32, 128, 32000,  4096,   1e4,   1e-5),
    ModelShape("llama-2-13b",     40, 5120, 13824, 40, 40, 128, 32000,  4096,   1e4,   1e-5),
    ModelShape("llama-2-70b",     80, 8192, 28672, 64, 8,  128, 32000,  4096,   1e4,   1e-5),
    ModelShape("codellama-34b",   48, 8192, 22016, 64, 8,  128, 32000,  16384,  1e6,   1e-5),
    ModelShape("llama-3-8b",      32, 4096, 14336, 32, 8,  128, 128256, 8192,   5e5,   1e-5),
    ModelShape("llama-3-70b",     80, 8192, 28672, 64, 8,  128, 128256, 8192,   5e5,   1e-5),
    ModelShape("llama-3.1-8b",    32, 4096, 14336, 32, 8,  128, 128256, 131072, 5e5,   1e-5,
               **_LLAMA3),
    ModelShape("llama-3.1-70b",   80, 8192, 28672, 64, 8,  128, 128256, 131072, 5e5,   1e-5,
               **_LLAMA3),
    # Version 0.1 has a sliding window of 4096 tokens, which longer positions cannot extend.
    ModelShape("mistral-7b-v0.2", 32, 4096, 14336, 32, 8,  128, 32000,  32768,  1e6,   1e-5),
    ModelShape("mistral-7b-v0.3", 32, 4096, 14336, 32, 8,  128, 32768,  32768,  1e6,   1e-5),
    # Base models; trained at 32768 tokens (arXiv:2412.15115), whatever their config.json allows.
    ModelShape("qwen2.5-7b",      28, 3584, 18944, 28, 4,  128, 152064, 32768,  1e6,   1e-6,
               **_QWEN),
    ModelShape("qwen2.5-14b",     48, 5120, 13824, 40, 8,  128, 152064, 32768,  1e6,   1e-5,
               **_QWEN),
    ModelShape("qwen2.5-32b",     64, 5120, 27648, 40, 8,  128, 152064, 32768,  1e6,   1e-5,
               **_QWEN),
    ModelShape("qwen2.5-72b",     80, 8192, 29568, 64, 8,  128, 152064, 32768,  1e6,   1e-5,
               **_QWEN),
]
# fmt: on
MODELS: dict[str, ModelShape] = {shape.name: shape for shape in _TABLE}

_ALIASES = {
    "mistral-7b": "mistral-7b-v0.3",
    "llama-2-34b": "codellama-34b",
    "llama-34b": "codellama-34b",
    "code-llama-34b": "codellama-34b",
}
_SUFFIXES = re.compile(r"-(hf|chat|base|instruct|python)$")

# Architecture: (biases of q, k, v; norms of q and k).
_ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


def find_model(name: str) -> ModelShape:
    """Return the shape of a model by name, or out of a folder with a config.json.

    Names are taken as people type them: ``meta-llama/Llama-2-7b-hf`` is ``llama-2-7b``.

    Raises:
        ValueError: an unknown name, naming what is known, or a config.json that cannot be served.
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
    raise ValueError(
        f"MODEL is {name!r}: {hint}it must be a folder with a config.json or one of "
        f"{', '.join(MODELS)}"
    )


def _plain_name(name: str) -> str:
    plain = name.rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    plain = re.sub(r"^meta-", "", plain)
    plain = re.sub(r"^llama-?(\d)", r"llama-\1", plain)
    while _SUFFIXES.search(plain):
        plain = _SUFFIXES.sub("", plain)
    return plain


def _from_folder(folder: Path) -> ModelShape:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"MODEL is {folder}: it must have a config.json")
    try:
        config = json.loads(path.read_text())
        return shape_from_hf(config, folder.resolve().name)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it must describe a model's shape") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def shape_from_hf(config: dict[str, Any], name: str) -> ModelShape:
    """Return the shape that a Hugging Face ``config.json`` describes.

    Raises:
        ValueError: an architecture, or an attention, that is not of this family.
        KeyError: a field that no shape can do without.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"architecture in config.json is {architecture}: it must be one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    sliding = config.get("sliding_window")
    # Qwen2 carries the field and a switch; Mistral the field alone.
    if sliding and config.get("use_sliding_window", architecture == "MistralForCausalLM"):
        raise ValueError(
            f"sliding_window in config.json is {sliding}: it must be off, tokens further apart "
            "never see each other"
        )
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise ValueError(f"{field} in config.json is {config[field]}: it must be off")
    qkv_bias, qk_norm = _ARCHITECTURES[architecture]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return ModelShape(
        name=name,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab=config["vocab_size"],
        window=config["max_position_embeddings"],
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_type=rope.get("rope_type", rope.get("type", "default")),
        rope_factor=float(rope.get("factor", 1.0)),
        rope_original=rope.get("original_max_position_embeddings", 0),
    )


def megatron_flags(shape: ModelShape) -> list[list[str]]:
    """Return the flags that make Megatron build ``shape``, one list a theme.

    Vocabulary and window are not among them: they belong to the data and to the run.
    """
    size = [
        *("--num-layers", str(shape.layers), "--hidden-size", str(shape.hidden)),
        *("--ffn-hidden-size", str(shape.ffn), "--num-attention-heads", str(shape.heads)),
    ]
    if shape.kv_heads != shape.heads:
        size += ["--group-query-attention", "--num-query-groups", str(shape.kv_heads)]
    if shape.head_dim * shape.heads != shape.hidden:
        size += ["--kv-channels", str(shape.head_dim)]
    kind = [
        *("--swiglu", "--normalization", "RMSNorm", "--norm-epsilon", f"{shape.norm_eps:g}"),
        "--disable-bias-linear",
    ]
    kind += ["--add-qkv-bias"] if shape.qkv_bias else []
    kind += ["--qk-layernorm"] if shape.qk_norm else []
    kind += [] if shape.tied else ["--untie-embeddings-and-output-weights"]
    kind += ["--attention-dropout", "0", "--hidden-dropout", "0"]
    rotary = ["--position-embedding-type", "rope", "--rotary-base", f"{shape.theta:.0f}"]
    return [size, kind, rotary]
