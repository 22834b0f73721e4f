# SPDX-License-Identifier: Apache-2.0
"""CLEX's rotation on a GPU: Transformer Engine's kernel and the compiled reduction."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

S, B, H, PAIRS = 512, 2, 4, 64


def gradients(dtype, fused, interleaved):
    from megatron_cream.extras.clex.trained_rotary import make_carrier, turn

    torch.manual_seed(0)
    config = SimpleNamespace(apply_rope_fusion=fused, rotary_interleaved=interleaved)
    t = torch.randn(S, B, H, 2 * PAIRS, device="cuda").to(dtype).requires_grad_()
    inv_freq = torch.rand(B, PAIRS, device="cuda", requires_grad=True)
    ids = torch.stack([torch.randperm(32768)[:S].sort().values for _ in range(B)]).cuda()
    weights = torch.zeros(5, device="cuda", requires_grad=True)
    output = turn(t, make_carrier(inv_freq, ids, weights), config)
    upstream = torch.randn(S, B, H, 2 * PAIRS, device="cuda").to(dtype)
    return output.detach(), *torch.autograd.grad(output, (t, inv_freq), upstream)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_fused_equals_unfused(dtype, most, interleaved):
    expected = gradients(dtype, False, interleaved)
    found = gradients(dtype, True, interleaved)
    for ours, reference in zip(found, expected, strict=True):
        difference = (ours.float() - reference.float()).norm()
        assert difference < most * reference.float().norm()
    assert found[2].dtype == torch.float32


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled_reduction_equals_the_plain_one(interleaved):
    from megatron_cream.extras.clex.trained_rotary import _compiled_pull, pull

    torch.manual_seed(0)
    wide = torch.randn(2, S, B, H, 3 * PAIRS * 2, device="cuda", dtype=torch.bfloat16)
    grad, turned = wide[..., : 2 * PAIRS]  # strided, as gradients of attention may be
    positions = torch.randint(32768, (B, S), device="cuda").float()
    expected = pull(grad, turned, positions, PAIRS, interleaved)
    found = _compiled_pull()(grad, turned, positions, PAIRS, interleaved)
    assert (found - expected).norm() < 1e-4 * expected.norm()
