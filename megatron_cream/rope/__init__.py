# SPDX-License-Identifier: Apache-2.0
"""How a position becomes an angle.

make_scaling             an interpolation by name: none, linear, ntk
scaling_from_hf          the one a Hugging Face config describes
PositionRotaryEmbedding  position ids [b, s] to float32 angles [s, b, 1, d] (needs torch, megatron)
install_rotary           puts it into a built GPTModel                     (needs torch, megatron)
"""

from typing import Any

from megatron_cream.rope.scaling import SCALINGS, RopeScaling, make_scaling, scaling_from_hf

__all__ = [
    "SCALINGS",
    "PositionRotaryEmbedding",
    "RopeScaling",
    "install_rotary",
    "make_scaling",
    "scaling_from_hf",
]

_NEEDS_MEGATRON = ("PositionRotaryEmbedding", "install_rotary")


def __getattr__(name: str) -> Any:
    # Tools that only need a formula must not wait for torch and megatron to be imported.
    if name in _NEEDS_MEGATRON:
        from megatron_cream.rope import rotary

        return getattr(rotary, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
