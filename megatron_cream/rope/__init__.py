# SPDX-License-Identifier: Apache-2.0
"""Turns positions into angles: RoPE and its interpolations. numpy only: no torch, no megatron.

make_scaling     an interpolation by name
SCALINGS         their classes by name, each with what it is: trained, evaluation only, its options
compose          one on top of a base model that has one already
scaling_from_hf  the one a Hugging Face config describes
hf_rope_fields   what to write into a Hugging Face config

A new interpolation is one subclass of ``RopeScaling``; see ``scaling``.
"""

from megatron_cream.rope.huggingface import hf_rope_fields, scaling_from_hf
from megatron_cream.rope.lists import compose
from megatron_cream.rope.scaling import SCALINGS, RopeScaling, make_scaling, trainer_of

__all__ = [
    "SCALINGS",
    "RopeScaling",
    "compose",
    "hf_rope_fields",
    "make_scaling",
    "scaling_from_hf",
    "trainer_of",
]
