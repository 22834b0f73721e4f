# SPDX-License-Identifier: Apache-2.0
"""The rotation's own backward equals autograd through plain angles."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("cpu_megatron")

S, B, H, PAIRS = 7, 3, 2, 4


def config(interleaved=False):
    return SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=interleaved)


def inputs(head_dim, dtype=torch.float64):
    torch.manual_seed(0)
    t = torch.randn(S, B, H, head_dim, dtype=dtype, requires_grad=True)
    inv_freq = torch.rand(B, PAIRS, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(50)[:S].sort().values for _ in range(B)])
    return t, inv_freq, ids


def by_plain_angles(t, inv_freq, ids, interleaved):
    from megatron.core.models.common.embeddings import rope_utils

    angles = (ids.to(inv_freq.dtype)[:, :, None] * inv_freq[:, None, :]).transpose(0, 1)[:, :, None]
    doubled = (
        angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    )
    return rope_utils._apply_rotary_pos_emb_bshd(t, doubled, rotary_interleaved=interleaved)


def by_carrier(t, inv_freq, ids, interleaved, weights=None):
    from megatron_cream.extras.clex.trained_rotary import make_carrier, turn

    weights = torch.zeros(5, requires_grad=True) if weights is None else weights
    return turn(t, make_carrier(inv_freq, ids, weights), config(interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2 * PAIRS, 2 * PAIRS + 6])
def test_same_values_and_gradients_as_autograd(interleaved, head_dim):
    t, inv_freq, ids = inputs(head_dim)
    upstream = torch.randn(S, B, H, head_dim, dtype=torch.float64)
    results = []
    for way in (by_plain_angles, by_carrier):
        output = way(t, inv_freq, ids, interleaved)
        results.append((output, *torch.autograd.grad(output, (t, inv_freq), upstream)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert results[0][2].abs().min() > 1e-3, "no frequency has a gradient to compare"


def test_gradcheck():
    t, inv_freq, ids = inputs(2 * PAIRS)
    assert torch.autograd.gradcheck(lambda x, f: by_carrier(x, f, ids, False), (t, inv_freq))


def test_gradients_add_up_over_layers_and_recomputation():
    from torch.utils.checkpoint import checkpoint

    from megatron_cream.extras.clex.trained_rotary import make_carrier, turn

    t, inv_freq, ids = inputs(2 * PAIRS)
    weights = torch.zeros(5, requires_grad=True)

    def two_layers(x, carrier, recomputed):
        for _ in range(2):
            if recomputed:
                x = checkpoint(turn, x, carrier, config(), use_reentrant=True).sin()
            else:
                x = turn(x, carrier, config()).sin()
        return x

    grads = []
    for recomputed in (False, True):
        inv_freq.grad = None
        two_layers(t, make_carrier(inv_freq, ids, weights), recomputed).sum().backward()
        grads.append(inv_freq.grad)
    expected = by_plain_angles(t, inv_freq, ids, False).sin()
    expected = by_plain_angles(expected, inv_freq, ids, False).sin()
    (reference,) = torch.autograd.grad(expected.sum(), inv_freq)
    for found in grads:
        torch.testing.assert_close(found, reference, atol=1e-12, rtol=1e-12)


def test_weights_get_zeros_so_that_overlapped_reduction_ends():
    t, inv_freq, ids = inputs(2 * PAIRS)
    weights = torch.ones(5, requires_grad=True)
    by_carrier(t, inv_freq, ids, False, weights).sum().backward()
    assert torch.equal(weights.grad, torch.zeros(5))


def test_bfloat16_keeps_a_float32_gradient():
    t, inv_freq, ids = inputs(2 * PAIRS, torch.float32)
    output = by_carrier(t.bfloat16(), inv_freq, ids, False)
    upstream = torch.randn(output.shape).bfloat16()
    (found,) = torch.autograd.grad(output, inv_freq, upstream)
    exact = by_plain_angles(t, inv_freq, ids, False)
    (expected,) = torch.autograd.grad(exact, inv_freq, upstream.float())
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_nothing_as_large_as_angles_is_kept():
    t, inv_freq, ids = inputs(2 * PAIRS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        by_carrier(t, inv_freq, ids, False)
    assert sorted(kept) == sorted([t.numel(), B * (PAIRS + S)])
