# SPDX-License-Identifier: Apache-2.0
"""What a pipeline stage hands its model.

Megatron's own batch function gives middle pipeline stages nothing and takes position ids away
from the last one; RoPE turns queries and keys on every stage. Here each stage gets position ids:
the first and last with the tokens, the others drawn from the sample index without a message.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.utils import is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Batch = dict[str, torch.Tensor | None]


def get_batch(args: Namespace, data_iterator: Iterator | None, vp_stage: int | None) -> Batch:
    """Return tensors ``[b, s / CP]`` of this stage; middle stages have position ids only.

    Every tensor is cut for this context-parallel rank here, position ids included, and nowhere
    else: the rotary embedding must not cut again.
    """
    if is_first_or_last_pipeline_stage(vp_stage):
        batch = _tokens_and_positions(args, data_iterator)
    else:
        batch = {"position_ids": _positions(args, data_iterator)}
    batch = get_batch_on_this_cp_rank(
        {**batch, "cu_seqlens": None},
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
    )
    return {key: batch.get(key) for key in BATCH_KEYS}


def _tokens_and_positions(args: Namespace, data_iterator: Iterator | None) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS}
    return get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=True,  # Megatron's name for "this stage needs all four tensors"
    )


def _positions(args: Namespace, data_iterator: Iterator | None) -> torch.Tensor:
    if data_iterator is None:  # validation and test use plain positions
        plain = torch.arange(args.seq_length, device=torch.cuda.current_device())
        return plain.expand(args.micro_batch_size, -1)
    return next(data_iterator)["position_ids"].cuda(non_blocking=True)
