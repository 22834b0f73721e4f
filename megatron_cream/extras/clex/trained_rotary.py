# SPDX-License-Identifier: Apache-2.0
"""The module that takes the place of Megatron's rotary embedding under CLEX, and its rotation.

Every model chunk has a replica of the weights, as a parameter of its own, so that Megatron's
optimizers, checkpoints and parameter gathering treat it as they treat any. It is a vector, which
Megatron gives no weight decay, and of the model's type: in a bfloat16 model the optimizer has the
float32 master, and what is trained, evaluated and exported are frequencies of the same rounded
weights, themselves float32. (A float32 parameter in a bfloat16 model trains, too, but Megatron
0.19.2 cannot save its optimizer state.)

The rotation has a gradient for the frequencies. Attention is handed a *carrier*: float32
``[b, d / 2 + s]``, the frequencies of each sample and then the positions of its tokens (whole
numbers, exact to 2 ** 24), in place of angles ``[s, b, 1, d]``. It is one small tensor, so that its
gradient comes back through recomputation, pipeline stages and activation offloading like any
other's, and nothing but it is kept for the angles of all layers.

A pair (y1, y2) that was turned by phi moves with phi as (-y2, y1), so with g the gradient of y

    dL / d inv_freq[b, i] = sum_s position[b, s] sum_heads (g2 y1 - g1 y2)

which needs the rotated queries and keys, that attention keeps anyway: one pass over y and g.

The gradient of the weights is made once per step. Every rank turns queries and keys of its own
heads, layers, samples and tokens, each of them once over all ranks, so the gradient of the table of
frequencies is the plain sum over the world, tensor, pipeline, context and data parallel at once: a
few thousand numbers. Each rank then pulls the same sum through the ODE and has the same gradient of
the weights, in every replica of them, with no further communication.

That is done after Megatron has reduced all other gradients (``config.finalize_model_grads_func``):
until then the weights have had gradients of zero, which go through its buckets without effect,
with or without overlap. Each rank writes the whole gradient; a distributed optimizer reads its
shard of it. The divisor is Megatron's own, by tokens or by ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_cream.errors import UserError
from megatron_cream.extras.clex import NOT_FINITE, ScaleTable, field_of
from megatron_cream.mcore.rotary import ROTATIONS, PositionRotaryEmbedding, rotate, rounded_powers
from megatron_cream.rope.formulas import ClexScaling, row_of


class ClexRotaryEmbedding(PositionRotaryEmbedding):
    """Rotary angles at the scale of each sample, from trained weights.

    With ``set_scales`` the next step turns each sample at its own scale and ``forward`` returns a
    carrier (see the module). Without, all turn at the scale of their length: evaluation.

    Attributes:
        weights: W_up and W_down, flat.
        table: frequencies of this step, shared by the chunks of a rank.
        replica: number of this replica over pipeline stages and chunks; 0 is the one that counts.
        fresh: the checkpoint to be loaded has no such weights; they stay as initialised.
    """

    def __init__(
        self,
        scaling: ClexScaling,
        *,
        rotary_interleaved: bool = False,
        device: torch.device | str | None = None,
        cp_group: Any = None,
    ) -> None:
        super().__init__(
            scaling, rotary_interleaved=rotary_interleaved, device=device, cp_group=cp_group
        )
        powers = rounded_powers(scaling, device)
        # Not of a layout that is only counted.
        self.table: Any = None if powers.is_meta else ScaleTable(scaling, powers)
        self.weights = nn.Parameter(field_of(scaling).initial().to(device))
        self.replica = 0
        self.fresh = False
        self._scales: Tensor | None = None
        self._length: int | None = None

    def set_scales(self, scales: Tensor) -> None:
        """Hand over the scale t of each sample, ``[b]``, for the next ``forward``."""
        self._scales = scales

    def set_length(self, length: int) -> None:
        self._length = length

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> Tensor:
        """Return a carrier ``[b, d / 2 + s]``, or angles ``[s, b, 1, d]`` where no scale was set.

        Raises:
            RuntimeError, ValueError: as ``PositionRotaryEmbedding.forward``.
        """
        scales, self._scales = self._scales, None
        if scales is None:
            scale = self.scaling.scale_of(self._length or max_seq_len)
            self.inv_freq = self.table.at(self.weights, scale)
            return super().forward(max_seq_len, offset, packed_seq, cp_group)
        position_ids = self.take_position_ids(max_seq_len, packed_seq, cp_group)
        rows = row_of(scales).to(torch.int64)
        inv_freq = self.table.solve(self.weights)[rows]
        return make_carrier(inv_freq, position_ids, self.weights)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the weights for a checkpoint: one replica over all ranks writes them."""
        if self.fresh:
            return {}
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tensors = make_sharded_tensors_for_checkpoint(
            {"weights": self.weights},
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        for tensor in tensors.values():
            tensor.replica_id = (self.replica, *tensor.replica_id[1:])
        return tensors

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self.table.forget()
        if self.fresh and f"{prefix}weights" not in state_dict:
            self.fresh = False  # from now on they are saved
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.table is not None:
            self.table.forget()  # the weights move, or are rounded
        return super()._apply(fn, recurse)


def make_carrier(inv_freq: Tensor, position_ids: Tensor, weights: Tensor) -> Tensor:
    """Return the carrier of frequencies ``[b, d / 2]`` and position ids ``[b, s]``.

    ``weights`` get a gradient of zeros: theirs is made by ``finish``, and Megatron's
    overlapped reduction waits until every parameter of a stage has had one.
    """
    return _Carrier.apply(inv_freq, position_ids.to(inv_freq.dtype), weights)


def carrier_angles(carrier: Tensor, tokens: int, interleaved: bool) -> Tensor:
    """Return the angles ``[s, b, 1, d]`` of a carrier for s = ``tokens``."""
    inv_freq, positions = _parts(carrier, tokens)
    angles = (positions[:, :, None] * inv_freq[:, None, :]).transpose(0, 1).unsqueeze(2)
    if interleaved:
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat((angles, angles), dim=-1)


def turn(t: Tensor, carrier: Tensor, config: Any) -> Tensor:
    """Rotate queries or keys ``[s, b, h, d_head]`` by a carrier, fused where the config says so.

    Args:
        config: Megatron's transformer config.
    """
    return _Turn.apply(t, carrier, config)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inv_freq: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
        ctx.pairs = inv_freq.shape[1]
        ctx.like = weights.shape, weights.dtype, weights.device
        return torch.cat((inv_freq, positions), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        shape, dtype, device = ctx.like
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        return grad[:, : ctx.pairs], None, zeros


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, carrier: Tensor, config: Any) -> Tensor:
        angles = carrier_angles(carrier, t.shape[0], config.rotary_interleaved)
        turned = rotate(t, angles, config)
        ctx.save_for_backward(turned, carrier)
        ctx.config = config
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        turned, carrier = ctx.saved_tensors
        tokens, interleaved = turned.shape[0], ctx.config.rotary_interleaved
        back = -carrier_angles(carrier, tokens, interleaved)
        grad_t = rotate(grad, back, ctx.config)
        grad_carrier = None
        if ctx.needs_input_grad[1]:
            inv_freq, positions = _parts(carrier, tokens)
            pulled = _pull_for(grad)(grad, turned, positions, inv_freq.shape[1], interleaved)
            grad_carrier = torch.cat((pulled, torch.zeros_like(positions)), dim=1)
        return grad_t, grad_carrier, None


def _parts(carrier: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return frequencies ``[b, d / 2]`` and positions ``[b, s]``."""
    pairs = carrier.shape[1] - tokens
    return carrier[:, :pairs], carrier[:, pairs:]


def pull(grad: Tensor, turned: Tensor, positions: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """Return the gradient of the frequencies ``[b, d / 2]`` at one rotation.

    Args:
        grad, turned: ``[s, b, h, d_head]``, of which the first ``2 * pairs`` dimensions turn.
        positions: ``[b, s]``, in the type of the result.
    """
    g, y = (x[..., : 2 * pairs].to(positions.dtype) for x in (grad, turned))
    if interleaved:
        g1, g2, y1, y2 = g[..., 0::2], g[..., 1::2], y[..., 0::2], y[..., 1::2]
    else:
        (g1, g2), (y1, y2) = g.chunk(2, dim=-1), y.chunk(2, dim=-1)
    by_token = (g2 * y1 - g1 * y2).sum(dim=2)
    return (by_token * positions.t()[:, :, None]).sum(dim=0)


def _pull_for(grad: Tensor) -> Any:
    return _compiled_pull() if grad.is_cuda else pull


@cache
def _compiled_pull() -> Any:
    """``pull`` in one pass over its inputs; ten passes as separate kernels.

    By Megatron's own choice of compiler, which --disable-jit-fuser turns off.
    """
    from megatron.core import jit

    return jit.jit_fuser(pull)


ROTATIONS[2] = turn  # what attention does with a carrier


def share_table(chunks: list[nn.Module], fresh: bool = False) -> list[nn.Module]:
    """Have the chunks of a rank share one table, and every replica know its number.

    Replica 0 alone counts in the gradient norm (Megatron's ``shared``) and goes into checkpoints.

    Args:
        chunks: built, unwrapped, with ``ClexRotaryEmbedding`` in them.
        fresh: the checkpoint that the run starts from has no weights of CLEX.

    Raises:
        UserError: a chunk without attention, which could not tell when its gradients are done.
    """
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
