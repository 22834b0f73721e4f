# SPDX-License-Identifier: Apache-2.0
"""Maps Megatron tensors to the Hugging Face tensors they are made of: one table per family.

A row names a tensor of a Megatron checkpoint, its Hugging Face parts with their shapes, and in
which order the rows of the parts follow each other. Megatron keeps one global tensor for all
layers of a model, ``[layers, rows, columns]``, and one for all experts of all layers,
``[layers, experts, rows, columns]``; Hugging Face a tensor each.

Sizes in shapes: ``h`` hidden, ``q`` query heads x head, ``kv`` key-value heads x head, ``d`` head,
``f`` feed-forward, ``v`` vocabulary, ``e`` experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

STACKED = "stacked"
"""Parts follow each other: gate before up, as SwiGLU splits ``linear_fc1``."""

BY_GROUP = "by group"
"""For each key-value head: its query heads, its key, its value."""


@dataclass(frozen=True)
class WeightPart:
    """A Hugging Face tensor: its name with ``{l}`` and ``{e}`` open, and its symbolic shape."""

    name: str
    shape: tuple[str, ...]

    def at(self, place: tuple[int, ...]) -> str:
        """Return the name at ``(layer, expert)``, ``(layer,)`` or ``()``."""
        return self.name.format(**dict(zip("le", place, strict=False)))


@dataclass(frozen=True)
class WeightRow:
    """A Megatron tensor and what it is made of.

    Attributes:
        key: name in a Megatron checkpoint.
        parts: Hugging Face tensors.
        order: of the rows of several parts.
        when: feature of the model without which there is no such tensor, or None.
        alias: another name of the same tensor, in another of Megatron's implementations.
    """

    key: str
    parts: tuple[WeightPart, ...]
    order: str = STACKED
    when: str | None = None
    alias: str | None = None

    @property
    def axes(self) -> str:
        """Leading axes of the global tensor: ``""``, ``"l"`` or ``"le"``."""
        return "".join(axis for axis in "le" if f"{{{axis}}}" in self.parts[0].name)


def _row(
    key: str,
    *parts: str,
    order: str = STACKED,
    when: str | None = None,
    alias: str | None = None,
    prefixes: tuple[str, str] = ("", ""),
) -> WeightRow:
    """Make a row; ``parts`` read "name: shape", ``prefixes`` are of Megatron's and their names."""
    ours, theirs = prefixes
    split = [part.split(": ") for part in parts]
    named = tuple(WeightPart(theirs + name, tuple(shape.split())) for name, shape in split)
    return WeightRow(ours + key, named, order, when, alias and ours + alias)


_layer = partial(_row, prefixes=("decoder.layers.", "model.layers.{l}."))


# fmt: off
_ENDS = (
    _row("embedding.word_embeddings.weight", "model.embed_tokens.weight: v h"),
    _row("decoder.final_layernorm.weight", "model.norm.weight: h"),
    _row("output_layer.weight", "lm_head.weight: v h", when="untied"),
)
_ATTENTION = (
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight: h"),
    _layer("self_attention.linear_qkv.weight", "self_attn.q_proj.weight: q h",
           "self_attn.k_proj.weight: kv h", "self_attn.v_proj.weight: kv h", order=BY_GROUP),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight: h q"),
)
_QKV_BIAS = (
    _layer("self_attention.linear_qkv.bias", "self_attn.q_proj.bias: q",
           "self_attn.k_proj.bias: kv", "self_attn.v_proj.bias: kv", order=BY_GROUP,
           when="qkv_bias"),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight: d"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight: d"),
)
_MLP = (
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight: h"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight: f h", "mlp.up_proj.weight: f h"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight: h f"),
)
_LINEAR_BIAS = (
    _layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias: h", when="linear_bias"),
    _layer("mlp.linear_fc1.bias", "mlp.gate_proj.bias: f", "mlp.up_proj.bias: f",
           when="linear_bias"),
    _layer("mlp.linear_fc2.bias", "mlp.down_proj.bias: h", when="linear_bias"),
)
# The norm before experts is a module of its own with Transformer Engine, and takes the name of a
# norm fused with linear_fc1 without it.
_EXPERTS = (
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight: h",
           alias="mlp.linear_fc1.layer_norm_weight"),
    _layer("mlp.router.weight", "block_sparse_moe.gate.weight: e h"),
    _layer("mlp.experts.experts.linear_fc1.weight", "block_sparse_moe.experts.{e}.w1.weight: f h",
           "block_sparse_moe.experts.{e}.w3.weight: f h"),
    _layer("mlp.experts.experts.linear_fc2.weight", "block_sparse_moe.experts.{e}.w2.weight: h f"),
)
# fmt: on


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        model_type: value in config.json.
        rows: its tensors.
        qkv_bias: it always has biases on queries, keys and values.
        qk_norm: it normalises queries and keys.
        experts: its feed-forward layers are mixtures of experts.
        biases: config.json may ask for biases on all linear layers.
        windowed: config.json may limit attention to a sliding window.
    """

    model_type: str
    rows: tuple[WeightRow, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    biases: bool = False
    windowed: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama", (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_MLP, *_LINEAR_BIAS), biases=True
    ),
    "MistralForCausalLM": Family("mistral", (*_ENDS, *_ATTENTION, *_MLP), windowed=True),
    "Qwen2ForCausalLM": Family("qwen2", (*_ENDS, *_ATTENTION, *_QKV_BIAS, *_MLP), qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", (*_ENDS, *_ATTENTION, *_QK_NORM, *_MLP), qk_norm=True),
    "MixtralForCausalLM": Family(
        "mixtral", (*_ENDS, *_ATTENTION, *_EXPERTS), experts=True, windowed=True
    ),
}

IGNORED = (".rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and every loader computes for itself."""


def rows_in_order(row: WeightRow, part_rows: list[int], groups: int) -> Iterator[tuple[int, range]]:
    """Yield parts and rows of theirs in the order in which the Megatron tensor has them.

    Args:
        part_rows: number of rows of each part.
        groups: key-value heads of the model.
    """
    if row.order == STACKED:
        yield from ((part, range(rows)) for part, rows in enumerate(part_rows))
        return
    for group in range(groups):
        for part, rows in enumerate(part_rows):
            size = rows // groups
            yield part, range(group * size, (group + 1) * size)


def rows_of_part(row: WeightRow, part_rows: list[int], groups: int, part: int) -> list[range]:
    """Return which rows of the Megatron tensor are those of a part, in the part's order."""
    found, first = [], 0
    for other, rows in rows_in_order(row, part_rows, groups):
        if other == part:
            found.append(range(first, first + len(rows)))
        first += len(rows)
    return found
