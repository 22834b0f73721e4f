# SPDX-License-Identifier: Apache-2.0
"""Passes through a model that is being trained, by Megatron's own schedule at any layout.

``MegatronModel`` has a model to itself; here the trainer's wrappers, attention, virtual stages and
sequence parallelism stay as they are. All that ``while_training`` needs of the trainer is here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_signal_handler, get_timers, training
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.utils import print_rank_last
from torch import Tensor

from megatron_cream.evaluation.forward import ForwardPass, PassScores, score_rows
from megatron_cream.evaluation.megatron_model import ContextShard, output_input
from megatron_cream.mcore.trainer import write_scalars

if TYPE_CHECKING:
    from megatron_cream.evaluation.while_training import Question


def length_step() -> int:
    """Return what the number of tokens of a pass must be a multiple of: 16 per rank that cuts it.

    Sequence parallelism cuts it by tensor ranks, context parallelism twice by its own, and FP8
    needs multiples of 16.
    """
    ranks = mpu.get_tensor_model_parallel_world_size() * mpu.get_context_parallel_world_size()
    return 32 * ranks


def pad_pass(one: ForwardPass, step: int) -> ForwardPass:
    """Return a pass with tokens at the end, which no other token sees, up to a multiple of step."""
    missing = -one.tokens.shape[1] % step
    padding = one.tokens.new_zeros(len(one.tokens), missing)
    return ForwardPass(torch.cat([one.tokens, padding], dim=1), one.rows, one.targets)


@torch.no_grad()
def run_scheduled(
    model: Sequence[Any], passes: Sequence[ForwardPass], vocabulary: int
) -> list[PassScores]:
    """Answer passes ``[1, n]`` of one n, those of this data-parallel rank; all ranks call it.

    Args:
        model: chunks of the model as the trainer has them.
        passes: as many on each data-parallel rank, a multiple of the pipeline stages.
        vocabulary: tokens that count, without padding rows of the output layer.

    Returns:
        answers in order; none on a rank that is not of the last pipeline stage.
    """
    config = get_model_config(model[0])
    tokens = passes[0].tokens.shape[1]
    iterators = [iter(passes) for _ in model]
    timers, config.timers = config.timers, None
    machine = get_rerun_state_machine()
    mode = machine.get_mode()
    machine.set_mode(RerunMode.DISABLED)
    for chunk in model:
        chunk.eval()
    try:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, vocabulary=vocabulary),
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=list(model),
            num_microbatches=len(passes),
            seq_length=tokens,
            micro_batch_size=1,
            decoder_seq_length=tokens,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        for chunk in model:
            chunk.train()
        machine.set_mode(mode)
        config.timers = timers


def _forward_step(passes: Iterator[ForwardPass], model: Any, vocabulary: int) -> tuple[Tensor, Any]:
    one = next(passes)
    inner: Any = unwrap_model(model)
    ranks = mpu.get_context_parallel_world_size()
    own = ContextShard(one, mpu.get_context_parallel_rank(), ranks)
    device = next(inner.parameters()).device
    seen: list[tuple[Tensor, Tensor | None]] = []
    with output_input(inner, seen):
        output = model(
            input_ids=own.tokens.to(device),
            position_ids=own.positions.to(device),
            attention_mask=None,
        )
    return output, partial(_read, inner=inner, own=own, seen=seen, vocabulary=vocabulary)


def _read(
    output: Tensor, *, inner: Any, own: ContextShard, seen: list[Any], vocabulary: int, **_: Any
) -> PassScores:
    """Return the scores of a pass, on every tensor and context rank of the last stage."""
    ((hidden, weight),) = seen
    if inner.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    kept = hidden[own.kept.to(hidden.device)].transpose(0, 1)  # [1, rows here, h]
    targets = own.targets.to(kept.device)
    if targets.numel():
        several = mpu.get_tensor_model_parallel_world_size() > 1
        with _whole_input(inner.output_layer):
            found = score_rows(
                kept.flatten(0, 1),
                lambda rows: _logits(inner, rows, weight),
                targets.flatten(),
                vocabulary,
                mpu.get_tensor_model_parallel_rank(),
                mpu.get_tensor_model_parallel_group() if several else None,
            )
        logprobs, best = (values.view(targets.shape) for values in found)
    else:
        logprobs, best = torch.zeros_like(targets, dtype=torch.float64), targets
    logprobs, best = own.gather(logprobs, best, mpu.get_context_parallel_group())
    return PassScores(logprobs.cpu(), best.cpu())


def _logits(inner: Any, rows: Tensor, weight: Tensor | None) -> Tensor:
    scale = getattr(inner, "_scale_logits", lambda logits: logits)
    return scale(inner.output_layer(rows, weight=weight)[0])


@contextmanager
def _whole_input(layer: Any) -> Iterator[None]:
    """Have an output layer take rows as they are, which are whole on every tensor rank."""
    before, layer.sequence_parallel = layer.sequence_parallel, False
    try:
        yield
    finally:
        layer.sequence_parallel = before


def ask(
    model: list[Any], questions: Sequence[Question], length: int, vocabulary: int
) -> np.ndarray:
    """Return the sums of every question ``[questions, 4]``, on every rank.

    Args:
        length: tokens of each question, before they are padded.
        vocabulary: as for ``run_scheduled``.
    """
    step, rank = length_step(), mpu.get_data_parallel_rank()
    ranks, stages = mpu.get_data_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    own = list(range(rank, len(questions), ranks))
    # Every rank takes part in as many passes; what one has too few of is asked once more.
    most = -(-len(questions) // ranks)
    most = -(-most // stages) * stages
    asked = own + [0] * (most - len(own))
    tokens = -(-length // step) * step
    passes = [pad_pass(questions[index].one, step) for index in asked]
    assert all(one.tokens.shape[1] == tokens for one in passes)
    answers = run_scheduled(model, passes, vocabulary)
    device = next(model[0].parameters()).device
    sums = torch.zeros(len(questions), 4, dtype=torch.float64, device=device)
    first = mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0
    if answers and first:
        for index, scores in zip(own, answers, strict=False):
            sums[index] = torch.tensor(questions[index].read(scores), dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.cpu().numpy()


@contextmanager
def as_served(args: Namespace, model: list[Any]) -> Iterator[list[Any]]:
    """Gather weights that an overlapped optimizer has not yet; yield the chunks' rotaries.

    Their lengths may be set: afterwards they turn as in training again.
    """
    overlaps = training.should_disable_forward_pre_hook(args)
    if overlaps:
        training.disable_forward_pre_hook(model)
    try:
        with ExitStack() as stack:
            rotaries = [unwrap_model(chunk).rotary_pos_emb for chunk in model]
            for rotary in rotaries:
                stack.enter_context(rotary.as_served())
            yield rotaries
    finally:
        if overlaps:
            training.enable_forward_pre_hook(model)


def must_stop(args: Namespace) -> bool:
    """Return whether a rank was told to stop: time is short then, and a checkpoint comes first."""
    return bool(args.exit_signal_handler and any(get_signal_handler().signals_received()))


@contextmanager
def untimed() -> Iterator[None]:
    """Keep what is done out of the rate of the next line of the log."""
    get_timers()("interval-time").stop()
    yield
    get_timers()("interval-time", log_level=0).start(barrier=True)


def finish_async_save() -> None:
    """Wait until a checkpoint that is being written is whole."""
    maybe_finalize_async_save(blocking=True)


def tell(values: dict[str, float], iteration: int, seconds: float) -> None:
    """Print figures on the last rank, and write them where Megatron writes its own."""
    words = " | ".join(f"{name}: {value:.6g}" for name, value in values.items())
    print_rank_last(f" validation after iteration {iteration} | {words} | {seconds:.1f} s")
    write_scalars({f"validation/{name}": value for name, value in values.items()}, iteration)
