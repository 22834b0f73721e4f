# SPDX-License-Identifier: Apache-2.0
"""What Megatron's trainer cannot do beside CLEX, refused before a GPU is asked for."""

from __future__ import annotations

from argparse import Namespace

from megatron_cream.errors import UserError

_GRADIENTS = "the gradient of clex's weights is written into Megatron's own gradient buffers"
_ANGLES = "the rotation of clex is not captured"

# (attribute, values that are fine, flag, why it is refused)
_REFUSED = (
    ("use_megatron_fsdp", (False, None), "--use-megatron-fsdp", _GRADIENTS),
    ("use_torch_fsdp2", (False, None), "--use-torch-fsdp2", _GRADIENTS),
    ("cuda_graph_impl", ("none", None), "--cuda-graph-impl", _ANGLES),
    ("fused_single_qkv_rope", (False, None), "--fused-single-qkv-rope", _ANGLES),
)


def validate_flags(args: Namespace) -> None:
    """Refuse flags that do not go with --rope-interpolation clex.

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    for attribute, fine, flag, why in _REFUSED:
        value = getattr(args, attribute, None)
        if value not in fine:
            raise UserError(
                f"{flag} is {value}: --rope-interpolation is 'clex', so it must be left out, {why}"
            )
