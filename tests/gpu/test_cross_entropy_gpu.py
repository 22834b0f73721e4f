# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's cross entropy in Megatron's model: as exact as Megatron's own."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

S, B, V = 256, 2, 49152


@pytest.fixture(scope="module")
def tp_group():
    from megatron_cream.mcore.build_model import initialize_ranks

    initialize_ranks()
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_group()


def loss_and_gradient(tp_group, te):
    """By ``LanguageModule.compute_language_model_loss``, with the config that our flag makes."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    from megatron_cream.extras import te_cross_entropy

    config = SimpleNamespace(cross_entropy_loss_fusion=False, cross_entropy_fusion_impl="native")
    te_cross_entropy.EXTRA.configure(
        SimpleNamespace(transformer=config), SimpleNamespace(te_cross_entropy=te)
    )
    assert config.cross_entropy_loss_fusion == te
    module = SimpleNamespace(
        config=config, tp_group=tp_group, pg_collection=SimpleNamespace(tp=tp_group)
    )
    logits, labels, upstream = inputs()
    logits.requires_grad_()
    loss = LanguageModule.compute_language_model_loss(module, labels, logits)
    loss.backward(upstream)
    return loss.detach(), logits.grad


def inputs():
    """Logits ``[s, b, v]``, some rows far from others, labels, a masked upstream ``[b, s]``."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(S, B, V, device="cuda")
    logits[S // 2 :] += 100 * torch.randn(S // 2, B, 1, device="cuda")
    labels = torch.randint(V, (B, S), device="cuda")
    upstream = torch.rand(B, S, device="cuda") * (torch.rand(B, S, device="cuda") < 0.9)
    return logits.bfloat16(), labels, upstream


def exact():
    logits, labels, upstream = inputs()
    logits = logits.double().requires_grad_()
    flat = torch.nn.functional.cross_entropy(
        logits.transpose(0, 1).reshape(-1, V), labels.reshape(-1), reduction="none"
    )
    loss = flat.view(B, S)
    loss.backward(upstream.double())
    return loss.detach(), logits.grad


def test_as_exact_as_megatrons_own(tp_group):
    wanted = exact()
    errors = {
        te: [(ours - right).abs().max() for ours, right in zip(found, wanted, strict=True)]
        for te in (False, True)
        for found in [loss_and_gradient(tp_group, te)]
    }
    assert wanted[1].abs().max() > 0.5
    assert errors[True][0] < max(1e-4, 2 * errors[False][0])
    # Gradients are bfloat16: 2 ** -9 of the largest, by rounding alone.
    assert errors[True][1] < max(2**-9, 1.01 * errors[False][1])


def test_the_kernel_that_is_here_is_taken():
    from megatron_cream.extras import te_cross_entropy

    assert te_cross_entropy.why_absent() is None
