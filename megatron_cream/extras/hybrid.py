# SPDX-License-Identifier: Apache-2.0
"""Validates HybridModel patterns, and builds their layers where Transformer Engine is missing.

A pattern has one symbol per layer: ``*`` attention, ``-`` MLP, ``E`` experts, ``M`` Mamba, ``G``
gated delta net; ``|`` ends a pipeline stage. Megatron builds all of them from Transformer Engine.
With ``--transformer-impl local`` (part of ``--cpu``) they are built from its local modules here,
attention, MLP and experts only: the recurrent layers are GPU kernels.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_cream.errors import UserError
from megatron_cream.mcore.hooks import Extra

_LOCAL = {Symbols.ATTENTION, Symbols.MLP, Symbols.MOE, Symbols.PIPE}
_REFUSED = {
    Symbols.MLA: f"positions do not reach MLA; use {Symbols.ATTENTION!r}",
    Symbols.DS_ATTENTION: f"positions do not reach sparse MLA; use {Symbols.ATTENTION!r}",
    Symbols.MTP_SEPARATOR: "multi-token prediction is not supported",
}


def validate_pattern(args: Namespace) -> None:
    """Refuse a ``--hybrid-layer-pattern`` that positions do not reach, or that cannot be built.

    Raises:
        UserError: naming the pattern and the symbol in the way.
    """
    flag, pattern = _flag_and_pattern(args)
    if pattern is None:
        return
    for symbol, why in _REFUSED.items():
        if symbol in pattern:
            raise UserError(f"{flag} is {pattern!r}: it must be without {symbol!r}, {why}")
    if Symbols.ATTENTION not in pattern:
        raise UserError(
            f"{flag} is {pattern!r}: it must have attention, {Symbols.ATTENTION!r}; nothing else "
            "knows where a token stands"
        )
    if args.transformer_impl == "local" and args.spec is None:
        _validate_local_layers(flag, pattern)


def _flag_and_pattern(args: Namespace) -> tuple[str, str | None]:
    if args.hybrid_layer_pattern is not None:
        return "--hybrid-layer-pattern", args.hybrid_layer_pattern
    return "--hybrid-override-pattern", getattr(args, "hybrid_override_pattern", None)


def _validate_local_layers(flag: str, pattern: str) -> None:
    others = sorted(set(pattern) - _LOCAL)
    if others:
        raise UserError(
            f"{flag} is {pattern!r} with --transformer-impl local (part of --cpu): layers "
            f"{' '.join(others)} need GPU kernels; only '*', '-' and 'E' can be built without"
        )


def configure_local_layers(config: Any, args: Namespace) -> None:
    """Have a Hybrid model config that asks for local layers, and names no ``--spec``, get them.

    Raises:
        UserError: its pattern has layers that there are no local ones of.
    """
    pattern = getattr(config, "hybrid_layer_pattern", None)
    if pattern is None or args.transformer_impl != "local" or config.hybrid_stack_spec is not None:
        return
    _validate_local_layers("--hybrid-layer-pattern", pattern)  # also that of a checkpoint
    config.hybrid_stack_spec = local_stack(config.transformer)


def local_stack(config: TransformerConfig) -> ModuleSpec:
    """Return a spec of attention, MLP and expert layers out of Megatron's local modules.

    The halves of GPTModel's own local layer, so that weights have the same names in a checkpoint
    as Transformer Engine's fused norms give them, and experts are those that GPTModel has.
    """
    whole = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        normalization=config.normalization,
    )
    experts = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        normalization=config.normalization,
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention_of(whole)),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp_of(whole)),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=_mlp_of(experts, {})),
        ),
        params={"final_norm": whole.input_layernorm},
    )


def _attention_of(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    return dataclasses.replace(
        layer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
    )


def _mlp_of(
    layer: TransformerLayerSubmodules, names: dict[str, str] | None = None
) -> TransformerLayerSubmodules:
    """Return the MLP half; ``names`` replaces the checkpoint names (experts share one norm)."""
    return dataclasses.replace(
        layer,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
        sharded_state_dict_keys_map=(layer.sharded_state_dict_keys_map if names is None else names),
    )


class LocalHybridStack(HybridStack):
    """HybridStack whose last norm is ``final_norm``; Megatron's is Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, final_norm: Any, **kw: Any):
        super().__init__(config, submodules, post_layer_norm=False, **kw)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = build_module(
                final_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )


class Hybrid(Extra):
    """``--hybrid-layer-pattern``."""

    def validate_flags(self, args: Namespace, extension: Any) -> None:
        validate_pattern(args)

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        configure_local_layers(config, args)


EXTRA = Hybrid()
