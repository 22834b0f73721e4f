# SPDX-License-Identifier: Apache-2.0
"""What a model is, said by a Hugging Face config.json and by Megatron's arguments.

``ModelShape`` is read from either and written as the other, so that two descriptions of one model
can be compared field by field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_cream.checkpoint.families import FAMILIES, Family, Part, Row

WINDOWED = ("mistral", "mixtral")
"""Model types whose config.json may limit attention to a sliding window."""


@dataclass(frozen=True)
class ModelShape:
    """Everything but the weights and the angles of a model.

    Attributes:
        architecture: a key of ``FAMILIES``.
        window: tokens that a token attends to, itself included, or None for all before it.
        linear_bias: biases on all linear layers, those of queries, keys and values included.
    """

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    tied: bool
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    experts: int | None = None
    experts_per_token: int | None = None
    window: int | None = None

    @property
    def family(self) -> Family:
        """The table of its tensors."""
        return FAMILIES[self.architecture]

    @property
    def untied(self) -> bool:
        """Whether the output layer has weights of its own."""
        return not self.tied

    def rows(self) -> list[Row]:
        """Return the rows of the family's table that this model has."""
        return [r for r in self.family.rows if r.when is None or getattr(self, r.when)]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape of a Hugging Face tensor."""
        sizes = {
            "h": self.hidden,
            "q": self.heads * self.head_dim,
            "kv": self.groups * self.head_dim,
            "d": self.head_dim,
            "f": self.ffn,
            "v": self.vocabulary,
            "e": self.experts,
        }
        return tuple(sizes[axis] for axis in part.shape)

    def leading(self, row: Row) -> tuple[int, ...]:
        """Return the sizes of the leading axes of a row: (), (layers,) or (layers, experts)."""
        return tuple({"l": self.layers, "e": self.experts}[axis] for axis in row.axes)

    def places(self) -> Iterator[tuple[Row, tuple[int, ...]]]:
        """Yield every tensor: its row, and its index along the leading axes, layer by layer."""
        rows = self.rows()
        yield from ((row, ()) for row in rows if not row.axes)
        for layer in range(self.layers):
            for row in (row for row in rows if row.axes):
                for rest in product(*map(range, self.leading(row)[1:])):
                    yield row, (layer, *rest)

    def differences(self, other: ModelShape) -> list[str]:
        """Name each field that differs, with both values, this one's first."""
        return [
            f"{field.name} {getattr(self, field.name)} != {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """Read config.json.

    Raises:
        ValueError: an architecture or a setting that is not served, or a missing value.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"architectures in config.json is {config.get('architectures')}: it must be one of "
            f"{tuple(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    _refuse_unserved(config, family)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    groups = _integer(config, "num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(
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


def model_flags(shape: ModelShape) -> list[str]:
    """Return the Megatron flags that build the model, without those of its angles."""
    flags = [
        *("--num-layers", shape.layers, "--hidden-size", shape.hidden),
        *("--ffn-hidden-size", shape.ffn, "--num-attention-heads", shape.heads),
        *("--kv-channels", shape.head_dim, "--group-query-attention"),
        *("--num-query-groups", shape.groups, "--vocab-size", shape.vocabulary),
        *("--normalization", "RMSNorm", "--norm-epsilon", shape.norm_epsilon, "--swiglu"),
        *("--position-embedding-type", "rope", "--attention-dropout", 0, "--hidden-dropout", 0),
    ]
    if shape.untied:
        flags.append("--untie-embeddings-and-output-weights")
    if not shape.linear_bias:
        flags.append("--disable-bias-linear")
    if shape.qkv_bias:
        flags.append("--add-qkv-bias")
    if shape.qk_norm:
        flags.append("--qk-layernorm")
    if shape.window is not None:
        flags += ["--window-size", f"{shape.window - 1},0"]
    if shape.experts:
        flags += ["--num-experts", shape.experts, "--moe-router-topk", shape.experts_per_token]
        flags += ["--moe-ffn-hidden-size", shape.ffn]
    return [str(flag) for flag in flags]


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
            raise ValueError(f"{key} in config.json is {value!r}: it must be {served[0]!r}")
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if biases != (False, False) and not (family.biases and biases == (True, True)):
        raise ValueError(
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
        raise ValueError(f"{key} in config.json is missing: the model cannot be built without it")
    return config[key]


def _integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        _needed(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} in config.json is {value!r}: it must be a positive integer")
    return value
