# SPDX-License-Identifier: Apache-2.0
"""How a position becomes an angle.

make_scaling             an interpolation by name, one of SCALINGS or TRAINED
compose                  one on top of a base model that has one already
scaling_from_hf          the one a Hugging Face config describes
hf_rope_fields           what to write into a Hugging Face config
PositionRotaryEmbedding  position ids [b, s] to float32 angles [s, b, 1, d] (needs torch, megatron)
install_rotary           puts it into a built GPTModel                     (needs torch, megatron)
"""

from importlib import import_module
from typing import Any

from megatron_cream.rope.base import RopeScaling
from megatron_cream.rope.composed import compose
from megatron_cream.rope.huggingface import hf_rope_fields, scaling_from_hf
from megatron_cream.rope.scaling import (
    EVALUATION_ONLY,
    NOT_BY_FACTOR,
    SCALINGS,
    TRAINED,
    make_scaling,
)

__all__ = [
    "EVALUATION_ONLY",
    "NOT_BY_FACTOR",
    "SCALINGS",
    "TRAINED",
    "PositionRotaryEmbedding",
    "RopeScaling",
    "compose",
    "hf_rope_fields",
    "install_rotary",
    "make_scaling",
    "scaling_from_hf",
]

_NEEDS_MEGATRON = {"PositionRotaryEmbedding": "rotary", "install_rotary": "install"}


def __getattr__(name: str) -> Any:
    # Tools that only need a formula must not wait for torch and megatron to be imported.
    if name in _NEEDS_MEGATRON:
        return getattr(import_module(f"megatron_cream.rope.{_NEEDS_MEGATRON[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
