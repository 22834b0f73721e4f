# SPDX-License-Identifier: Apache-2.0
"""Turns queries and keys by our Triton kernel, in one launch per layer.

Megatron's attention splits its projection into q, k and v, turns q, turns k, and in the backward
pass joins the three gradients again. Here it gets q and k turned already: the kernel reads the
projection as it is, by a table of cosines and sines that is made once per step, and writes its
gradient in one piece.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from megatron_cream.errors import UserError
from megatron_cream.mcore.hooks import Extra

FLAG = "--rope-kernel"
_NAMES = {"triton": "Triton", "te": "Transformer Engine"}


class RopeKernel(Extra):
    """``--rope-kernel``."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        add(
            FLAG,
            choices=tuple(_NAMES),
            help="what turns queries and keys (default: triton where it is installed and the "
            "interpolation is not trained)",
        )

    def validate_flags(self, args: Namespace, extension: Any = None) -> None:
        if args.rope_kernel and not args.apply_rope_fusion:
            raise UserError(
                f"{FLAG} is {args.rope_kernel!r}: RoPE is not fused (--no-rope-fusion or --cpu), "
                "so it must be left out"
            )
        if args.rope_kernel and args.dual_chunk is not None:
            raise UserError(
                f"{FLAG} is {args.rope_kernel!r} with --dual-chunk: it must be left out, that "
                "attention turns queries and keys itself"
            )
        if args.rope_kernel == "triton" and extension.trained:
            raise UserError(
                f"{FLAG} is 'triton': with --rope-interpolation {extension.rope_interpolation}, "
                "whose angles are trained, it must be 'te'"
            )

    def validate_machine(self, args: Namespace) -> None:
        if args.rope_kernel == "triton" and find_spec("triton") is None:
            raise UserError(
                f"{FLAG} is 'triton', which is not installed: leave it out, or give 'te'"
            )

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        hooks = config.pre_wrap_hooks
        if rope_kernel(args, extension) == _NAMES["triton"] and _use_triton not in hooks:
            hooks.append(_use_triton)


def rope_kernel(args: Namespace, extension: Any) -> str:
    """Return what turns queries and keys in this run, for the start block."""
    if args.dual_chunk is not None:
        return "dual chunk attention's own"
    if not args.apply_rope_fusion:
        return "unfused"
    able = find_spec("triton") is not None and not extension.trained
    return _NAMES[args.rope_kernel or ("triton" if able else "te")]


def _use_triton(chunks: list[Any]) -> list[Any]:
    """The hook that Megatron calls with the built model chunks of a rank."""
    for chunk in chunks:
        use_triton(chunk)
    return chunks


def use_triton(model: nn.Module) -> None:
    """Have every attention layer of a model with our rotary turn by a table. Idempotent.

    Args:
        model: a built, unwrapped model chunk that ``install_rotary`` was called with.
    """
    from megatron.core.transformer.attention import SelfAttention

    rotary: Any = model.rotary_pos_emb
    if not rotary.makes_tables:
        rotary.makes_tables = True
        for module in model.modules():
            if isinstance(module, SelfAttention):
                _turn_inside(module)


def _turn_inside(attention: Any) -> None:
    """Have one layer turn queries and keys where it makes them.

    Its forward then sees no rotary tensor. Angles, as inference has them, go Megatron's own way.
    """
    from megatron_cream.mcore.patches import set_built
    from megatron_cream.rope.rotation_kernel import rotate, rotate_mixed

    own = attention.get_query_key_value_tensors
    interleaved = attention.config.rotary_interleaved
    waiting: list[Tensor] = []  # the table of the running call

    def take_table(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        waiting.clear()
        table = kwargs.get("rotary_pos_emb")
        if not isinstance(table, Tensor) or table.dim() != 5:
            return None
        if not _has_no_rope(attention):
            waiting.append(table[0])
        return args, {**kwargs, "rotary_pos_emb": None}

    def get_turned(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            return own(*args, **kwargs)
        table = waiting.pop()
        if _gives_mixed(attention) and not kwargs.get("output_gate"):
            mixed, (queries, key, _) = own(*args, **{**kwargs, "split_qkv": False})
            return rotate_mixed(mixed, table, queries // key, interleaved)
        query, key, *rest = own(*args, **kwargs)
        return (*rotate(query, key, table, interleaved), *rest)

    attention.register_forward_pre_hook(take_table, with_kwargs=True)
    set_built(attention, "get_query_key_value_tensors", get_turned)


def _has_no_rope(attention: Any) -> bool:
    layers = attention.config.no_rope_freq
    return bool(layers and layers[attention.layer_number - 1])


def _gives_mixed(attention: Any) -> bool:
    """Return whether q, k and v of a layer are nothing but parts of its projection."""
    from megatron.core.transformer.identity_op import IdentityOp

    norms = attention.q_layernorm, attention.k_layernorm
    plain = all(norm is None or isinstance(norm, IdentityOp) for norm in norms)
    # Where tensor-parallel ranks share a group, each takes some of its queries.
    return (
        plain
        and not attention.config.test_mode
        and attention.config.num_query_groups >= attention.world_size
    )


EXTRA = RopeKernel()
