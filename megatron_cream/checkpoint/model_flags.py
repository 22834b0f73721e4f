# SPDX-License-Identifier: Apache-2.0
"""A model's shape as Megatron's flags, and in the arguments that they are parsed to.

Angles, vocabulary and lengths are not among the flags: they belong to the run.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_cream.checkpoint.model_shape import ModelShape


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


def described_shape(args: Namespace, architecture: str | None = None) -> ModelShape:
    """Return the shape that Megatron's arguments describe; whether Megatron serves it is not asked.

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
