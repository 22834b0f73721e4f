# SPDX-License-Identifier: Apache-2.0
"""How a position becomes an angle. numpy only: no torch, no megatron.

make_scaling     an interpolation by name, one of SCALINGS or TRAINED
compose          one on top of a base model that has one already
scaling_from_hf  the one a Hugging Face config describes
hf_rope_fields   what to write into a Hugging Face config
"""

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
    "RopeScaling",
    "compose",
    "hf_rope_fields",
    "make_scaling",
    "scaling_from_hf",
]
