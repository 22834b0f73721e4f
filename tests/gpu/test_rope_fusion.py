# SPDX-License-Identifier: Apache-2.0
"""Per-token angles through Transformer Engine's fused kernel equal the unfused rotation."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

S, H, D, TARGET = 512, 4, 128, 32768


def config(fused, interleaved=False):
    return SimpleNamespace(apply_rope_fusion=fused, rotary_interleaved=interleaved)


def strided(*shape):
    """A slice of a wider tensor, as queries are of the joint projection's output."""
    wide = torch.randn(*shape[:-1], 3 * shape[-1], device="cuda", dtype=torch.bfloat16)
    wide.requires_grad_()
    return wide, wide[..., : shape[-1]]


def angles(batch, interleaved=False):
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding
    from megatron_cream.positions import make_strategy
    from megatron_cream.rope import make_scaling

    scaling = make_scaling("linear", dim=D, factor=64.0, original_length=S)
    rotary = PositionRotaryEmbedding(scaling, rotary_interleaved=interleaved, device="cuda")
    strategy = make_strategy("cream", S, TARGET, sigma_relative=0.375, head_lengths=(100,))
    ids = [torch.from_numpy(strategy.layout(1, i).position_ids) for i in range(batch)]
    return rotary.angles(torch.stack(ids).cuda())


def both_ways(t_wide, t, freqs, interleaved=False):
    from megatron_cream.mcore.rotary import rotate

    results = []
    upstream = torch.randn_like(t)
    for fused in (True, False):
        t_wide.grad = None
        out = rotate(t, freqs, config(fused, interleaved))
        out.backward(upstream, retain_graph=True)
        results.append((out.float(), t_wide.grad.float()))
    return results


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [2, 4])
def test_samples_with_positions_of_their_own(batch, interleaved):
    wide, t = strided(S, batch, H, D)
    (out, grad), (out2, grad2) = both_ways(wide, t, angles(batch, interleaved), interleaved)
    torch.testing.assert_close(out, out2, atol=3e-2, rtol=2e-2)
    torch.testing.assert_close(grad, grad2, atol=3e-2, rtol=2e-2)
    assert (out - out2).norm() / out2.norm() < 4e-3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_factor_of_partly_rotated_heads(batch, interleaved):
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding, rotate
    from megatron_cream.rope import make_scaling

    scaling = make_scaling("yarn", dim=D // 2, factor=64.0, original_length=S)
    rotary = PositionRotaryEmbedding(scaling, rotary_interleaved=interleaved, device="cuda")
    ids = torch.arange(S, device="cuda").expand(batch, S) * 64
    wide, t = strided(S, batch, H, D)
    upstream = torch.randn_like(t)
    results = []
    for fused in (True, False):
        wide.grad = None
        out = rotate(t, rotary.angles(ids), config(fused, interleaved), scaling.attention_factor)
        out.backward(upstream)
        results.append((out.float(), wide.grad.float()))
    (out, grad), (out2, grad2) = results
    assert (out - out2).norm() / out2.norm() < 4e-3
    assert (grad - grad2).norm() / grad2.norm() < 4e-3
    assert torch.equal(out[..., D // 2 :], t[..., D // 2 :].float())


def test_packed_documents():
    wide, t = strided(S, H, D)
    (out, grad), (out2, grad2) = both_ways(wide, t, angles(1).transpose(0, 1))
    assert (out - out2).norm() / out2.norm() < 4e-3
    assert (grad - grad2).norm() / grad2.norm() < 4e-3


def test_strided_queries_are_not_copied():
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_cream.mcore.rotary import rotate

    _, t = strided(S, 2, H, D)
    seen = []
    own = rope_utils.fused_apply_rotary_pos_emb
    rope_utils.fused_apply_rotary_pos_emb = lambda rows, *a, **k: (
        seen.append(rows.data_ptr()) or own(rows, *a, **k)
    )
    try:
        rotate(t, angles(2), config(True))
    finally:
        rope_utils.fused_apply_rotary_pos_emb = own
    assert seen == [t.data_ptr()]
