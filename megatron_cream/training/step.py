# SPDX-License-Identifier: Apache-2.0
"""Forward step and loss, as Megatron's trainer calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from megatron_cream.data.batch import get_batch, packed_seq_params

_NO_TOKEN = 2.0**-40
"""Tokens reported of a micro-batch that trains none: a step of such has loss 0 and not 0 / 0.

Too few to change any other count, which float32 holds as a whole number."""

LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    data_iterator: Iterator | None, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossResult]]:
    """Run one micro-batch through this pipeline stage."""
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(args, data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packed = packed_seq_params(args, batch["cu_seqlens"])
    if packed is not None:  # Megatron's throughput counts the attention that there is
        update_seqlen_stats_from_cu_seqlens(batch["cu_seqlens"])
    timers("batch-generator").stop()
    if batch["scale"] is not None:
        get_attr_wrapped_model(model, "rotary_pos_emb").set_scales(batch["scale"])
    if batch["far"] is not None:
        get_attr_wrapped_model(model, "rotary_pos_emb").set_far(batch["far"])
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
    )
    return output, partial(token_loss, batch["loss_mask"])


def token_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> LossResult:
    """Return the summed loss, the number of tokens it is over, and what is logged.

    Megatron divides by the number of tokens over all ranks and micro-batches: the gradient by 1
    where there is none, the logged loss by what is reported here.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        _validate_finite(loss)
    reported = tokens.float().clamp(min=_NO_TOKEN)
    report = {"lm loss": torch.cat([loss.detach().view(1), reported.view(1)])}
    return loss, tokens, report


def _validate_finite(loss: torch.Tensor) -> None:
    checks: list[tuple[Any, str]] = [(torch.isnan, "NaN"), (torch.isinf, "Inf")]
    for rejected, name in checks:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=rejected,
            message=f"found {name} in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
