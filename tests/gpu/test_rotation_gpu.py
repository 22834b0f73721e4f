# SPDX-License-Identifier: Apache-2.0
"""The rotation kernel on a GPU: against float64, and in Megatron's layers against TE's kernel."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton")

VOCABULARY, TOKENS = 512, 384


def test_rotations_and_gradients_equal_float64():
    program = Path(__file__).parents[1] / "rope" / "rotation_interpreted.py"
    done = subprocess.run(
        [sys.executable, str(program), "cuda"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == 14


CASES = {
    "one head per group": {},
    "grouped queries": {"num_query_groups": 2},
    "norms of q and k": {"num_query_groups": 2, "qk_layernorm": True},
    "half of a head, in pairs": {"rotary_interleaved": True, "percent": 0.5},
    "recomputed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def step(options, kernel):
    """Loss per token and the gradients of one step."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.extras.rotation import use_triton
    from megatron_cream.mcore.build_model import initialize_ranks
    from megatron_cream.mcore.rotary import install_rotary
    from megatron_cream.rope import make_scaling

    options = dict(options)
    percent = options.pop("percent", 1.0)
    initialize_ranks()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=2, hidden_size=512, num_attention_heads=8, bf16=True,
        params_dtype=torch.bfloat16, hidden_dropout=0.0, attention_dropout=0.0,
        apply_rope_fusion=kernel != "unfused", gradient_accumulation_fusion=False,
        init_method_std=0.1, **options,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    model = GPTModel(config, spec, VOCABULARY, 4096, position_embedding_type="rope",
                     rotary_percent=percent).cuda()  # fmt: skip
    scaling = make_scaling("yarn", dim=round(64 * percent), factor=8.0, original_length=512)
    install_rotary(model, scaling)
    if kernel == "triton":
        use_triton(model)
    ids = torch.stack([torch.randperm(4096)[:TOKENS].sort().values for _ in range(2)]).cuda()
    tokens = torch.randint(VOCABULARY, (2, TOKENS)).cuda()
    loss = model(input_ids=tokens, position_ids=ids, attention_mask=None, labels=tokens)
    loss.float().mean().backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return [loss.detach().float(), *gradients]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_transformer_engines_kernel(name):
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    unfused, te, ours = (step(CASES[name], kernel) for kernel in ("unfused", "te", "triton"))
    for wanted, theirs, found in zip(unfused, te, ours, strict=True):
        rounding = (theirs - wanted).norm()
        assert (found - wanted).norm() < 2 * rounding + 1e-3 * wanted.norm()
