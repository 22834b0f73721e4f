# SPDX-License-Identifier: Apache-2.0
"""Reads a model's shape out of a Hugging Face config.json, and writes it."""

from __future__ import annotations

import reprlib
from typing import Any

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.checkpoint.weight_map import FAMILIES, Family
from megatron_cream.errors import UserError
from megatron_cream.json_values import MOST, flag, integer, number

MOST_MODULES = 100_000
"""Most layers, and most experts per layer: more is no model, and would take days to list."""

# What transformers takes where config.json says nothing.
_ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """Read config.json.

    Raises:
        UserError: an architecture or a setting that is not supported, or a value that is
            missing, of another type, or out of range.
    """
    architecture, family = _architecture(config)
    config = _ABSENT.get(family.model_type, {}) | config
    validate_values(config)
    _validate_features(config, family)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    groups = integer(config, "num_key_value_heads", heads)
    if heads % groups:
        raise UserError(
            f"num_key_value_heads in config.json is {groups}: it must divide the {heads} "
            "num_attention_heads"
        )
    experts, chosen = _experts(config, family)
    biases = bool(family.biases and config.get("attention_bias"))
    return ModelShape(
        architecture=architecture,
        layers=_integer(config, "num_hidden_layers"),
        hidden=hidden,
        ffn=_integer(config, "intermediate_size"),
        heads=heads,
        groups=groups,
        head_dim=_head_dim(config, hidden, heads),
        vocabulary=_integer(config, "vocab_size"),
        norm_epsilon=float(_needed(config, "rms_norm_eps")),
        tied=bool(config.get("tie_word_embeddings")),
        qkv_bias=family.qkv_bias or biases,
        linear_bias=biases,
        qk_norm=family.qk_norm,
        experts=experts,
        experts_per_token=chosen,
        window=integer(config, "sliding_window") if family.windowed else None,
    )


_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "sliding_window", "num_experts_per_tok"),
)
_MODULES = ("num_hidden_layers", "num_local_experts")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def validate_values(config: dict[str, Any]) -> None:
    """Check type and range of what config.json says of a model of one of ``FAMILIES``.

    Raises:
        UserError: a value of another type, or out of range.
    """
    for key in _SIZES:
        integer(config, key)
    for key in _MODULES:
        integer(config, key, most=MOST_MODULES)
    for key in _FLAGS:
        flag(config, key)
    if number(config, "rms_norm_eps", 0.5) >= 1:
        raise UserError(
            f"rms_norm_eps in config.json is {config['rms_norm_eps']}: it must be below 1"
        )


def window_of(config: dict[str, Any]) -> int:
    """Return max_position_embeddings, in tokens.

    Raises:
        UserError: it is missing, of another type, or out of range.
    """
    return _integer(config, "max_position_embeddings")


def _architecture(config: dict[str, Any]) -> tuple[str, Family]:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(
            f"architectures in config.json is {reprlib.repr(named)}: it must be one of "
            f"{tuple(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    if config.get("model_type", family.model_type) != family.model_type:
        raise UserError(
            f"model_type in config.json is {reprlib.repr(config['model_type'])}: "
            f"architectures says {architecture}, whose type is {family.model_type!r}"
        )
    return architecture, family


def _head_dim(config: dict[str, Any], hidden: int, heads: int) -> int:
    found = integer(config, "head_dim", hidden // heads)
    if found < 2 or found % 2:
        raise UserError(
            f"a head has {found} dimensions by config.json (head_dim, or hidden_size / "
            "num_attention_heads): it must be an even number of at least 2, which are turned in "
            "pairs"
        )
    return found


def _experts(config: dict[str, Any], family: Family) -> tuple[int | None, int | None]:
    """Return the experts per layer, and how many of them a token goes through."""
    if not family.experts:
        return None, None
    experts = _integer(config, "num_local_experts")
    return experts, _integer(config, "num_experts_per_tok", experts)


def config_fields(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of config.json that describe the model; inverse of shape_from_config."""
    fields: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": shape.family.model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
    }
    if shape.family.biases:
        fields |= {"attention_bias": shape.linear_bias, "mlp_bias": shape.linear_bias}
    if shape.experts:
        fields |= {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
        }
    if shape.family.windowed:
        fields["sliding_window"] = shape.window
    return fields


# Settings of config.json under which the model would not be the one that Megatron builds:
# (key, values that are supported).
_SUPPORTED = (
    ("hidden_act", ("silu",)),
    ("quantization_config", (None,)),
    ("use_sliding_window", (None, False)),
)


def _validate_features(config: dict[str, Any], family: Family) -> None:
    for key, supported in _SUPPORTED:
        value = config.get(key, supported[0])
        if value not in supported:
            raise UserError(
                f"{key} in config.json is {reprlib.repr(value)}: it must be {supported[0]!r}"
            )
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if biases != (False, False) and not (family.biases and biases == (True, True)):
        raise UserError(
            f"attention_bias and mlp_bias in config.json are {biases[0]} and {biases[1]}: "
            "Megatron has biases on all linear layers, on queries, keys and values alone (qwen2), "
            "or on none"
        )


def _needed(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"{key} in config.json is missing: the model cannot be built without it")
    return config[key]


def _integer(config: dict[str, Any], key: str, most: int = MOST) -> int:
    _needed(config, key)
    return integer(config, key, 0, most)
