# SPDX-License-Identifier: Apache-2.0
"""A micro-batch, as Megatron's trainer calls for it: the batch of a pipeline stage, model, loss.

Megatron's own batch function gives middle pipeline stages nothing and takes position ids away
from the last one; RoPE turns queries and keys on every stage. Here each stage gets position ids:
the first and last with the tokens, the others drawn from the sample index without a message.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_cream.config import extension_of

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

Batch = dict[str, Any]

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


def packed_seq_params(args: Namespace, cu_seqlens: torch.Tensor | None) -> PackedSeqParams | None:
    """Return Megatron's description of a packed batch, None for an ordinary one.

    The longest document is said to have --seq-length tokens, which it may: the true figure is on
    the GPU, and fetching it would stop the host at every micro-batch.
    """
    if cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=args.seq_length,
        max_seqlen_kv=args.seq_length,
        tokens_per_sample=args.seq_length,
    )


def get_batch(args: Namespace, data_iterator: Iterator | None, vp_stage: int | None) -> Batch:
    """Return tensors ``[b, s / CP]`` of this stage; middle stages have position ids only.

    ``scale`` is float32 ``[b]`` where each sample has one, on every stage; ``far`` is bool
    ``[b, s / CP]`` with mixed windows: whether a token's sample reaches beyond the original one.

    Every tensor is cut for this context-parallel rank here, position ids included, and nowhere
    else: the rotary embedding must not cut again. Packed documents are cut one by one, and have
    ``cu_seqlens``, int32 ``[documents + 1]``, of the whole sample.
    """
    packed = is_packed(args)
    outer = is_first_or_last_pipeline_stage(vp_stage)
    if outer:
        batch = _tokens_and_positions(args, data_iterator, packed)
    else:
        batch = _positions(args, data_iterator, packed)
    scale = batch.pop("scale", None)  # one per sample: not to be cut
    extension, far = extension_of(args), None
    if extension.mixed_windows:
        batch["position_ids"] = mark_far(
            batch["position_ids"], batch.get("cu_seqlens"), extension.original_length
        )
    batch = get_batch_on_this_cp_rank(
        {"cu_seqlens": None, "cu_seqlens_padded": None, **batch},
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
    )
    if extension.mixed_windows:
        batch["position_ids"], far = take_marks(batch["position_ids"])
    kept = {key: batch.get(key) if outer or key == "position_ids" else None for key in BATCH_KEYS}
    boundaries = batch["cu_seqlens"][0] if packed else None
    return {**kept, "cu_seqlens": boundaries, "scale": scale, "far": far}


def mark_far(ids: torch.Tensor, cu_seqlens: torch.Tensor | None, window: int) -> torch.Tensor:
    """Return position ids ``[b, s]``, each ``p`` of a far sample as ``-1 - p``.

    Far is a sample, or packed document, that has a position of ``window`` or more; its last one is
    its largest. The mark is in the ids because nothing but Megatron's own four tensors is cut for
    context parallelism where documents are packed, and after the cut a rank sees no whole sample.
    """
    last = ids[:, -1:]
    if cu_seqlens is not None:
        ends = cu_seqlens[0, 1:].long()
        tokens = torch.arange(ids.shape[1], device=ids.device)
        last = ids[:, ends - 1][:, torch.searchsorted(ends, tokens, right=True)]
    return torch.where(last >= window, ~ids, ids)


def take_marks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return position ids without the marks of ``mark_far``, and where those were, bool."""
    far = ids < 0
    return torch.where(far, ~ids, ids), far


def is_packed(args: Namespace) -> bool:
    """Say whether samples are packed documents, which attend only to themselves."""
    return extension_of(args).sample_unit == "packed-documents"


def _tokens_and_positions(args: Namespace, data_iterator: Iterator | None, packed: bool) -> Batch:
    batch: Batch = {}
    sample: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None  # of this rank the dataset is built
        sample = next(data_iterator)
        keys = (*BATCH_KEYS, "cu_seqlens") if packed else BATCH_KEYS
        batch = {key: sample[key].cuda(non_blocking=True) for key in keys}
        if packed:  # Megatron hands these on, too
            batch["cu_seqlens_padded"] = None
            batch["max_seqlen"] = batch["cu_seqlens"].diff(dim=1).amax(dim=1)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
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
    return batch | _scale_on_this_tp_rank(args, sample)


def _scale_on_this_tp_rank(args: Namespace, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the scale t of each sample, float32 ``[b]``, where angles depend on one."""
    if not extension_of(args).draws_scales:
        return {}
    empty = torch.empty(args.micro_batch_size, device=torch.cuda.current_device())
    scale = sample["scale"].cuda(non_blocking=True) if sample else empty
    if args.tensor_model_parallel_size > 1:
        source = mpu.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(scale, source, mpu.get_tensor_model_parallel_group())
    return {"scale": scale}


def _positions(args: Namespace, data_iterator: Iterator | None, packed: bool) -> dict[str, Any]:
    if data_iterator is None:  # validation and test use plain positions
        return _plain_positions(args)
    sample = next(data_iterator)
    ids = sample["position_ids"].cuda(non_blocking=True)
    if not packed:
        scale = {key: sample[key].cuda(non_blocking=True) for key in ("scale",) if key in sample}
        return {"position_ids": ids, **scale}
    # Megatron counts the tokens of a packed batch by its tokens.
    boundaries = sample["cu_seqlens"].cuda(non_blocking=True)
    return {"position_ids": ids, "tokens": ids, "cu_seqlens": boundaries}


def _plain_positions(args: Namespace) -> dict[str, Any]:
    device = torch.cuda.current_device()
    plain = torch.arange(args.seq_length, device=device).expand(args.micro_batch_size, -1)
    drawn = extension_of(args).plain_strategy().scale(0, 0)
    if drawn is None:
        return {"position_ids": plain}
    scale = torch.full((args.micro_batch_size,), drawn, device=device)
    return {"position_ids": plain, "scale": scale}
