# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's cross entropy in Megatron's model.

Megatron 0.19.2 has it in its model and refuses its flag, ``--cross-entropy-fusion-impl te``,
whatever Transformer Engine is installed: older kernels stored gradients in 16 bits over the logits,
and runs with them diverged (NVIDIA/Megatron-LM#5115). From 2.19 on they keep the logits and make
gradients of them in float32. So the flag here is another one, it looks at the kernel that is there,
and the model's config gets what Megatron's flag would have set.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.mcore.hooks import Extra

FLAG = "--te-cross-entropy"


class TeCrossEntropy(Extra):
    """``--te-cross-entropy``."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        add(
            FLAG,
            action="store_true",
            help="cross entropy by Transformer Engine's kernel, version 2.19 or later",
        )

    def validate_flags(self, args: Namespace, extension: Any = None) -> None:
        if not args.te_cross_entropy:
            return
        if args.cross_entropy_loss_fusion:
            raise UserError(
                f"--cross-entropy-loss-fusion is given with {FLAG}: it must be left out, they are "
                "two kernels for one thing"
            )
        if args.fp16:
            raise UserError(f"--fp16 is given with {FLAG}: its kernel takes bfloat16 and float32")

    def validate_machine(self, args: Namespace) -> None:
        if not args.te_cross_entropy:
            return
        if args.cpu:
            raise UserError(f"{FLAG} is given with --cpu: it needs GPUs; leave it out")
        reason = why_absent()
        if reason is not None:
            raise UserError(f"{FLAG} is given: it needs {reason}")

    def configure(self, config: Any, args: Namespace, extension: Any = None) -> None:
        if args.te_cross_entropy:
            config.transformer.cross_entropy_loss_fusion = True
            config.transformer.cross_entropy_fusion_impl = "te"


def why_absent() -> str | None:
    """Return what the kernel needs and what is installed, or None where it is there."""
    needs = "Transformer Engine 2.19 or later"
    if find_spec("transformer_engine") is None:
        return f"{needs}, which is not installed"
    import transformer_engine
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    # The argument came with the change; images carry builds between releases.
    if "overwrite_input" not in inspect.signature(parallel_cross_entropy).parameters:
        version = getattr(transformer_engine, "__version__", "one of unknown version")
        return f"{needs}, and {version} is installed, which stores gradients in 16 bits"
    return None


EXTRA = TeCrossEntropy()
