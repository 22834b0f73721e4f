# SPDX-License-Identifier: Apache-2.0
"""--rope-kernel: a model whose layers turn by the Triton kernel is the model that turns unfused.

Triton's interpreter runs the kernel, in a process of its own.
"""

import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from support import fork_python, forks

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.extras import rotation

pytestmark = pytest.mark.usefixtures("cpu_megatron")

CASES = {
    "grouped queries": {"num_query_groups": 2},
    "norms of q and k": {"num_query_groups": 2, "qk_layernorm": True},
    "half of a head, in pairs, with a factor": {"rotary_interleaved": True, "percent": 0.5},
    "a layer without RoPE": {"no_rope_freq": [0, 1]},
}
TOKENS, VOCABULARY = 7, 64


def outcome(options, triton):
    """Loss per token and gradients of one step, and how often a layer kept its own way."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.mcore.build_model import initialize_ranks
    from megatron_cream.mcore.rotary import install_rotary
    from megatron_cream.rope import make_scaling

    options = dict(options)
    percent = options.pop("percent", 1.0)
    initialize_ranks()
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, hidden_dropout=0.0,
        attention_dropout=0.0, gradient_accumulation_fusion=False, init_method_std=0.1,
        use_cpu_initialization=True, **options,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    model = GPTModel(config, spec, VOCABULARY, 4096, position_embedding_type="rope",
                     rotary_percent=percent)  # fmt: skip
    scaling = make_scaling("yarn", dim=round(16 * percent), factor=8.0, original_length=512)
    install_rotary(model, scaling)
    if triton:
        rotation.use_triton(model)
        rotation.use_triton(model)
    ids = torch.stack([torch.randperm(4096)[:TOKENS].sort().values for _ in range(2)])
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    loss = model(input_ids=tokens, position_ids=ids, attention_mask=None, labels=tokens)
    loss.mean().backward()
    gradients = [p.grad for _, p in model.named_parameters()]
    return [loss.detach().numpy(), *(g.numpy() for g in gradients if g is not None)]


def both(options):
    os.environ["TRITON_INTERPRET"] = "1"
    fork_python.forget_triton()
    from megatron_cream.mcore import rotary
    from megatron_cream.rope import rotation_kernel

    unfused = outcome(options, triton=False)
    seen = []
    for name in ("rotate", "rotate_mixed"):
        own = getattr(rotation_kernel, name)
        setattr(rotation_kernel, name, lambda *a, own=own: (seen.append(own.__name__), own(*a))[1])
    rotary.rotate = None  # a layer that still turned by angles would stop here
    return unfused, outcome(options, triton=True), seen


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_unfused_model(name):
    unfused, turned, seen = forks.call(both, CASES[name])
    assert len(unfused) == len(turned) > 10
    for found, wanted in zip(turned, unfused, strict=True):
        torch.testing.assert_close(*map(torch.from_numpy, (found, wanted)), atol=2e-5, rtol=1e-3)
    kernel = "rotate" if "qk_layernorm" in CASES[name] else "rotate_mixed"
    assert seen == [kernel] * (1 if "no_rope_freq" in CASES[name] else 2)


def args(**given):
    return Namespace(
        **{"rope_kernel": None, "dual_chunk": None, "apply_rope_fusion": True, **given}
    )


PLAIN, CLEX = (
    ExtensionConfig(96, 768, 96, rope_interpolation=name, rope_factor=8.0)
    for name in ("linear", "clex")
)


def test_the_start_block_says_which(monkeypatch):
    monkeypatch.setattr(rotation, "find_spec", lambda name: object())
    assert rotation.rope_kernel(args(), PLAIN) == "Triton"
    assert rotation.rope_kernel(args(), CLEX) == "Transformer Engine"
    assert rotation.rope_kernel(args(rope_kernel="te"), PLAIN) == "Transformer Engine"
    assert rotation.rope_kernel(args(apply_rope_fusion=False), PLAIN) == "unfused"
    monkeypatch.setattr(rotation, "find_spec", lambda name: None)
    assert rotation.rope_kernel(args(), PLAIN) == "Transformer Engine"


def test_what_it_does_not_go_with(monkeypatch):
    with pytest.raises(UserError, match=r"^--rope-kernel is 'te': .*--no-rope-fusion"):
        rotation.EXTRA.validate_flags(args(rope_kernel="te", apply_rope_fusion=False), PLAIN)
    with pytest.raises(UserError, match="--rope-interpolation clex.* must be 'te'"):
        rotation.EXTRA.validate_flags(args(rope_kernel="triton"), CLEX)
    monkeypatch.setattr(rotation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        rotation.EXTRA.validate_machine(args(rope_kernel="triton"))


@pytest.mark.parametrize(("flag", "hooks"), [(None, 1), ("te", 0)])
def test_the_hook_comes_once(flag, hooks, monkeypatch):
    monkeypatch.setattr(rotation, "find_spec", lambda name: object())
    config = SimpleNamespace(pre_wrap_hooks=[])
    for _ in range(2):
        rotation.EXTRA.configure(config, args(rope_kernel=flag), PLAIN)
    assert len(config.pre_wrap_hooks) == hooks
