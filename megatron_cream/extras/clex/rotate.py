# SPDX-License-Identifier: Apache-2.0
"""The rotation with a gradient for the frequencies.

Attention is handed a *carrier*: float32 ``[b, d / 2 + s]``, the frequencies of each sample and then
the positions of its tokens (whole numbers, exact to 2 ** 24), in place of angles ``[s, b, 1, d]``.
It is one small tensor, so that its gradient comes back through recomputation, pipeline stages and
activation offloading like any other's, and nothing but it is kept for the angles of all layers.

A pair (y1, y2) that was turned by phi moves with phi as (-y2, y1), so with g the gradient of y

    dL / d inv_freq[b, i] = sum_s position[b, s] sum_heads (g2 y1 - g1 y2)

which needs the rotated queries and keys, that attention keeps anyway: one pass over y and g.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_cream.mcore.attention_rotation import ROTATIONS, rotate


def make_carrier(inv_freq: Tensor, position_ids: Tensor, weights: Tensor) -> Tensor:
    """Return the carrier of frequencies ``[b, d / 2]`` and position ids ``[b, s]``.

    ``weights`` get a gradient of zeros: theirs is not made here (see ``gradients``), and Megatron's
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
