# SPDX-License-Identifier: Apache-2.0
"""A model's shape in a Hugging Face config.json: read, refused, written."""

from __future__ import annotations

from typing import Any

from megatron_cream.checkpoint.families import FAMILIES, Family
from megatron_cream.checkpoint.shape import ModelShape
from megatron_cream.errors import UserError

WINDOWED = ("mistral", "mixtral")
"""Model types whose config.json may limit attention to a sliding window."""


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """Read config.json.

    Raises:
        UserError: an architecture or a setting that is not served, or a missing value.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise UserError(
            f"architectures in config.json is {config.get('architectures')}: it must be one of "
            f"{tuple(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    _refuse_unserved(config, family)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    groups = _integer(config, "num_key_value_heads", heads)
    if heads % groups:
        raise UserError(
            f"num_key_value_heads in config.json is {groups}: it must divide the {heads} "
            "num_attention_heads"
        )
    biases = bool(family.biases and config.get("attention_bias"))
    return ModelShape(
        architecture=architecture,
        layers=_integer(config, "num_hidden_layers"),
        hidden=hidden,
        ffn=_integer(config, "intermediate_size"),
        heads=heads,
        groups=groups,
        head_dim=_integer(config, "head_dim", hidden // heads),
        vocabulary=_integer(config, "vocab_size"),
        norm_epsilon=float(_needed(config, "rms_norm_eps")),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or biases,
        linear_bias=biases,
        qk_norm=family.qk_norm,
        experts=_integer(config, "num_local_experts") if family.experts else None,
        experts_per_token=_integer(config, "num_experts_per_tok") if family.experts else None,
        window=_window(config, family),
    )


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
    if shape.family.model_type in WINDOWED:
        fields["sliding_window"] = shape.window
    return fields


# Settings of config.json under which the model would not be the one that Megatron builds:
# (key, values that are served).
_SERVED = (
    ("hidden_act", ("silu",)),
    ("quantization_config", (None,)),
    ("use_sliding_window", (None, False)),
)


def _refuse_unserved(config: dict[str, Any], family: Family) -> None:
    for key, served in _SERVED:
        value = config.get(key, served[0])
        if value not in served:
            raise UserError(f"{key} in config.json is {value!r}: it must be {served[0]!r}")
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if biases != (False, False) and not (family.biases and biases == (True, True)):
        raise UserError(
            f"attention_bias and mlp_bias in config.json are {biases[0]} and {biases[1]}: "
            "Megatron has biases on all linear layers, on queries, keys and values alone (qwen2), "
            "or on none"
        )


def _window(config: dict[str, Any], family: Family) -> int | None:
    if family.model_type not in WINDOWED:
        return None
    return config.get("sliding_window")


def _needed(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"{key} in config.json is missing: the model cannot be built without it")
    return config[key]


def _integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        _needed(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} in config.json is {value!r}: it must be a positive integer")
    return value
