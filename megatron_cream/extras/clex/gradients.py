# SPDX-License-Identifier: Apache-2.0
"""The gradient of CLEX's weights: once per step, over all ranks, where Megatron finishes gradients.

Every rank turns queries and keys of its own heads, layers, samples and tokens, each of them once
over all ranks, so the gradient of the table of frequencies is the plain sum over the world, tensor,
pipeline, context and data parallel at once: a few thousand numbers. Each rank then pulls the same
sum through the ODE and has the same gradient of the weights, in every replica of them, with no
further communication.

That is done after Megatron has reduced all other gradients (``config.finalize_model_grads_func``):
until then the weights have had gradients of zero, which go through its buckets without effect,
with or without overlap. Each rank writes the whole gradient; a distributed optimizer reads its
shard of it. The divisor is Megatron's own, by tokens or by ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_cream.errors import UserError
from megatron_cream.extras.clex.frequencies import NOT_FINITE, ScaleTable
from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding


def share_table(chunks: list[nn.Module], fresh: bool = False) -> list[nn.Module]:
    """Have the chunks of a rank share one table, and every replica know its number.

    Replica 0 alone counts in the gradient norm (Megatron's ``shared``) and goes into checkpoints.

    Args:
        chunks: built, unwrapped, with ``ClexRotaryEmbedding`` in them.
        fresh: the checkpoint that the run starts from has no weights of CLEX.

    Raises:
        UserError: a chunk without attention, which could not tell when its gradients are done.
    """
    from megatron.core.transformer.attention import Attention

    first = mpu.get_pipeline_model_parallel_rank() * len(chunks)
    table = _rotary(chunks[0]).table
    for i, chunk in enumerate(chunks):
        if not any(isinstance(module, Attention) for module in chunk.modules()):
            raise UserError(
                "--rope-interpolation is 'clex': a pipeline stage has no attention layer; every "
                "stage must have one, change --pipeline-model-parallel-layout or its size"
            )
        rotary: Any = chunk.rotary_pos_emb
        rotary.table = table
        rotary.replica, rotary.fresh = first + i, fresh
        rotary.weights.shared = rotary.replica > 0
    return chunks


def finalizer(before: Callable[..., None] | None) -> Callable[..., None]:
    """Return what Megatron is to call when the backward passes of a step are done.

    Args:
        before: what it would have called; None means its own ``finalize_model_grads``.
    """
    own = before or finalize_model_grads

    def finalize(
        model: list[nn.Module], num_tokens: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        own(model, num_tokens, *args, **kwargs)
        # Megatron has summed num_tokens over all ranks, in place.
        if num_tokens is not None:
            divisor = num_tokens.clamp(min=1).double()
        else:
            divisor = mpu.get_data_parallel_world_size(with_context_parallel=True)
        finish(model, divisor)

    return finalize


def finish(model: list[nn.Module], divisor: Tensor | float) -> None:
    """Write the gradient of the weights into ``main_grad`` of all chunks of this rank.

    A table that was solved on a GPU is checked here, at the end of its step: earlier, the host
    would have to wait for it.

    Args:
        model: Megatron's wrapped model chunks.
        divisor: what gradients are divided by.

    Raises:
        RuntimeError: the weights made no finite frequencies, or a gradient is not finite where
            Megatron checks the others.
    """
    rotaries = [_rotary(chunk) for chunk in model]
    table = rotaries[0].table
    gradient = weights_gradient(table, divisor)
    checks = [table.finite()]
    ddp_config: Any = model[0].ddp_config
    if ddp_config.check_for_nan_in_grad:
        checks.append(torch.isfinite(gradient).all())
    passed = torch.stack(checks).tolist()  # the only wait for the device
    if not passed[0]:
        raise RuntimeError(NOT_FINITE)
    if not all(passed):
        raise RuntimeError("found NaN or Inf in the gradient of CLEX's weights")
    table.forget()
    for rotary in rotaries:
        weights: Any = rotary.weights  # Megatron gives its parameters a main_grad
        weights.main_grad.copy_(gradient)


def weights_gradient(table: ScaleTable, divisor: Tensor | float) -> Tensor:
    """Return the weights' float64 gradient ``[size]`` over all ranks, on the table's device.

    The table is used up: whoever asks has it ``forget``.
    """
    total = table.gradient()
    torch.distributed.all_reduce(total)
    return table.pull_back(total / divisor)


def _rotary(chunk: nn.Module) -> ClexRotaryEmbedding:
    return get_attr_wrapped_model(chunk, "rotary_pos_emb")


def configure_finalizer(config: Any) -> None:
    """Put ``finalizer`` into Megatron's transformer config. Idempotent."""
    current = config.finalize_model_grads_func
    if not getattr(current, "finishes_clex", False):
        config.finalize_model_grads_func = finalizer(current)
        config.finalize_model_grads_func.finishes_clex = True
