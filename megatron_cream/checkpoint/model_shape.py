# SPDX-License-Identifier: Apache-2.0
"""Describes a model: the one shape that config.json, Megatron's arguments and plans share.

Angles, vocabulary and lengths are not among the flags here: they belong to a run.
"""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_cream.checkpoint.weight_map import FAMILIES, Family, WeightPart, WeightRow
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of, values


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
    return [str(flag) for flag in flags]


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
        architecture=architecture or _architecture(args, window),
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=(args.moe_ffn_hidden_size if experts else None) or args.ffn_hidden_size,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or args.hidden_size // heads,
        vocabulary=args.vocab_size or args.padded_vocab_size,
        norm_epsilon=args.layernorm_epsilon,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=bool(args.add_qkv_bias or args.add_bias_linear),
        linear_bias=bool(args.add_bias_linear),
        qk_norm=bool(args.qk_layernorm),
        experts=experts,
        experts_per_token=args.moe_router_topk if experts else None,
        window=window,
    )


def _architecture(args: Namespace, window: int | None) -> str:
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
    _validate_features(shape)
    return shape


def _validate_features(shape: ModelShape) -> None:
    family, windowed = shape.family, shape.window is not None
    features = {
        "--qk-layernorm": (shape.qk_norm, family.qk_norm),
        "--num-experts": (bool(shape.experts), family.experts),
        "--add-qkv-bias": (shape.qkv_bias, family.qkv_bias or shape.linear_bias),
        "--add-bias-linear": (shape.linear_bias, family.biases and shape.linear_bias),
        "--window-size": (windowed, family.windowed and windowed),
    }
    for flag, (has, needs) in features.items():
        if has != needs:
            raise UserError(
                f"{flag} of the checkpoint is {'on' if has else 'off'}: a {shape.architecture} "
                f"needs it {'on' if needs else 'off'}"
            )
