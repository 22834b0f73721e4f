# SPDX-License-Identifier: Apache-2.0
"""Describes a model: the one shape that config.json, Megatron's arguments and plans share.

Angles, vocabulary and lengths are not among the flags here: they belong to a run.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_cream.checkpoint.weight_map import FAMILIES, Family, WeightPart, WeightRow
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of, values, vocabulary
from megatron_cream.options import flag, integer, number


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
    def parameters(self) -> int:
        """Elements of all its Hugging Face tensors."""
        return sum(
            math.prod(self.leading(row)) * sum(math.prod(self.part_shape(p)) for p in row.parts)
            for row in self.rows()
        )

    @property
    def untied(self) -> bool:
        """Whether the output layer has weights of its own."""
        return not self.tied

    @property
    def tensors(self) -> int:
        """How many Hugging Face tensors it has."""
        return sum(math.prod(self.leading(row)) * len(row.parts) for row in self.rows())

    def rows(self) -> list[WeightRow]:
        """Return the rows of the family's table that this model has."""
        return [r for r in self.family.rows if r.when is None or getattr(self, r.when)]

    def part_shape(self, part: WeightPart) -> tuple[int, ...]:
        """Return the shape of a Hugging Face tensor."""
        sizes = {
            "h": self.hidden,
            "q": self.heads * self.head_dim,
            "kv": self.groups * self.head_dim,
            "d": self.head_dim,
            "f": self.ffn,
            "v": self.vocabulary,
            "e": self.experts or 0,
        }
        return tuple(sizes[axis] for axis in part.shape)

    def leading(self, row: WeightRow) -> tuple[int, ...]:
        """Return the sizes of the leading axes of a row: (), (layers,) or (layers, experts)."""
        return tuple({"l": self.layers, "e": self.experts or 0}[axis] for axis in row.axes)

    def places(self) -> Iterator[tuple[WeightRow, tuple[int, ...]]]:
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


def size_flags(shape: ModelShape) -> list[str]:
    """Return the flags that say how large a model is, without those that Megatron assumes."""
    flags = [
        *("--num-layers", shape.layers, "--hidden-size", shape.hidden),
        *("--ffn-hidden-size", shape.ffn, "--num-attention-heads", shape.heads),
    ]
    if shape.groups != shape.heads:
        flags += ["--group-query-attention", "--num-query-groups", shape.groups]
    if shape.head_dim * shape.heads != shape.hidden:
        flags += ["--kv-channels", shape.head_dim]
    if shape.experts:
        flags += ["--num-experts", shape.experts, "--moe-router-topk", shape.experts_per_token]
        flags += ["--moe-ffn-hidden-size", shape.ffn]
    return [str(word) for word in flags]


def kind_flags(shape: ModelShape) -> list[str]:
    """Return the flags that say what a model's layers are made of."""
    flags = ["--swiglu", "--normalization", "RMSNorm", "--norm-epsilon", str(shape.norm_epsilon)]
    flags += [] if shape.linear_bias else ["--disable-bias-linear"]
    flags += ["--add-qkv-bias"] if shape.qkv_bias else []
    flags += ["--qk-layernorm"] if shape.qk_norm else []
    flags += ["--untie-embeddings-and-output-weights"] if shape.untied else []
    flags += [] if shape.window is None else ["--window-size", f"{shape.window - 1},0"]
    return [*flags, "--attention-dropout", "0", "--hidden-dropout", "0"]


def shape_from_arguments(args: Namespace, architecture: str | None = None) -> ModelShape:
    """Return the shape that Megatron's arguments describe, of a family here or not.

    Args:
        architecture: what the model is to be called; by default the one whose features it has.
    """
    window = args.window_size[0] + 1 if args.window_size else None
    experts = args.num_experts or None
    heads = args.num_attention_heads
    return ModelShape(
        architecture=architecture or _architecture_of_arguments(args, window),
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=(args.moe_ffn_hidden_size if experts else None) or args.ffn_hidden_size,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or args.hidden_size // heads,
        vocabulary=vocabulary(args),
        norm_epsilon=args.layernorm_epsilon,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=bool(args.add_qkv_bias or args.add_bias_linear),
        linear_bias=bool(args.add_bias_linear),
        qk_norm=bool(args.qk_layernorm),
        experts=experts,
        experts_per_token=args.moe_router_topk if experts else None,
        window=window,
    )


def _architecture_of_arguments(args: Namespace, window: int | None) -> str:
    if args.num_experts:
        return "MixtralForCausalLM"
    if args.qk_layernorm:
        return "Qwen3ForCausalLM"
    if args.add_qkv_bias and not args.add_bias_linear:
        return "Qwen2ForCausalLM"
    return "LlamaForCausalLM" if window is None else "MistralForCausalLM"


def exportable_shape(args: Namespace, architecture: str | None = None) -> ModelShape:
    """Return the shape that saved arguments describe, of a family here.

    Args:
        architecture: what the model is to be called; by default the one whose features it has.

    Raises:
        UserError: a model that no family describes, naming the flag.
    """
    for name, needed in values("hugging_face").items():
        value = getattr(args, name, needed)
        if value != needed and not (needed is False and value is None):
            raise UserError(
                f"{flag_of(name)} of the checkpoint is {value!r}: it must be {needed!r} for a "
                f"Hugging Face model of the families {tuple(FAMILIES)}"
            )
    shape = shape_from_arguments(args, architecture)
    _validate_family(shape)
    return shape


def _validate_family(shape: ModelShape) -> None:
    family, windowed = shape.family, shape.window is not None
    features = {
        "--qk-layernorm": (shape.qk_norm, family.qk_norm),
        "--num-experts": (bool(shape.experts), family.experts),
        "--add-qkv-bias": (shape.qkv_bias, family.qkv_bias or shape.linear_bias),
        "--add-bias-linear": (shape.linear_bias, family.biases and shape.linear_bias),
        "--window-size": (windowed, family.windowed and windowed),
    }
    for name, (has, needs) in features.items():
        if has != needs:
            raise UserError(
                f"{name} of the checkpoint is {'on' if has else 'off'}: a {shape.architecture} "
                f"needs it {'on' if needs else 'off'}"
            )


MOST_MODULES = 100_000
"""Most layers, and most experts per layer: more is no model, and would take days to list."""

# Fields of ``ModelShape`` by their keys in config.json.
_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "window": "sliding_window",
}
_NEEDED = ("layers", "hidden", "ffn", "heads", "vocabulary", "norm_epsilon")

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
    architecture, family = _architecture_of_config(config)
    config = _ABSENT.get(family.model_type, {}) | config
    validate_values(config)
    _validate_supported(config, family)
    for field in (*_NEEDED, *(("experts", "experts_per_token") if family.experts else ())):
        _validate_present(config, _KEYS[field])
    found: dict[str, Any] = {field: config.get(key) for field, key in _KEYS.items()}
    found["norm_epsilon"], found["tied"] = float(config["rms_norm_eps"]), bool(found["tied"])
    found["groups"] = found["groups"] or found["heads"]
    found["head_dim"] = found["head_dim"] or found["hidden"] // found["heads"]
    if family.experts:
        integer(config, "num_experts_per_tok", most=config["num_local_experts"])
    else:
        found["experts"] = found["experts_per_token"] = None
    if not family.windowed:
        found["window"] = None
    _validate_heads(found["heads"], found["groups"], found["head_dim"])
    biases = bool(family.biases and config.get("attention_bias"))
    kinds = {"qkv_bias": family.qkv_bias or biases, "linear_bias": biases}
    return ModelShape(architecture=architecture, **found, **kinds, qk_norm=family.qk_norm)


def _validate_heads(heads: int, groups: int, head_dim: int) -> None:
    if heads % groups:
        raise UserError(
            f"num_key_value_heads in config.json is {groups}: it must divide the {heads} "
            "num_attention_heads"
        )
    if head_dim < 2 or head_dim % 2:
        raise UserError(
            f"a head has {head_dim} dimensions by config.json (head_dim, or hidden_size / "
            "num_attention_heads): it must be an even number of at least 2, which are turned in "
            "pairs"
        )


_COUNTS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "sliding_window", "num_experts_per_tok"),
)
_MODULES = ("num_hidden_layers", "num_local_experts")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def validate_values(config: dict[str, Any]) -> None:
    """Check type and range of what config.json says of a model of one of ``FAMILIES``.

    Raises:
        UserError: a value of another type, or out of range.
    """
    for key in _COUNTS:
        integer(config, key)
    for key in _MODULES:
        integer(config, key, most=MOST_MODULES)
    for key in _SWITCHES:
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
    _validate_present(config, "max_position_embeddings")
    return integer(config, "max_position_embeddings", 0)


def _architecture_of_config(config: dict[str, Any]) -> tuple[str, Family]:
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


# Settings of config.json under which the model would not be the one that Megatron builds:
# (key, values that are supported).
_SUPPORTED = (
    ("hidden_act", ("silu",)),
    ("quantization_config", (None,)),
    ("use_sliding_window", (None, False)),
)


def _validate_supported(config: dict[str, Any], family: Family) -> None:
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


def _validate_present(config: dict[str, Any], key: str) -> None:
    if config.get(key) is None:
        raise UserError(f"{key} in config.json is missing: the model cannot be built without it")


def config_fields(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of config.json that describe the model; inverse of shape_from_config."""
    family, fields = shape.family, {key: getattr(shape, field) for field, key in _KEYS.items()}
    if not family.experts:
        del fields["num_local_experts"], fields["num_experts_per_tok"]
    if not family.windowed:
        del fields["sliding_window"]
    if family.biases:
        fields |= {"attention_bias": shape.linear_bias, "mlp_bias": shape.linear_bias}
    named = {"architectures": [shape.architecture], "model_type": family.model_type}
    return {**named, **fields, "hidden_act": "silu"}
