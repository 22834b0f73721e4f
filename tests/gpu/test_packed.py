# SPDX-License-Identifier: Apache-2.0
"""Packed documents, each with a layout of its own, give what each gives alone."""

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

LENGTHS = (96, 160, 256)
VOCABULARY = 512


def build(kernel):
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

    initialize_ranks()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=kernel != "unfused",
        gradient_accumulation_fusion=False,
        init_method_std=0.1,
    )
    spec = get_gpt_layer_with_transformer_engine_spec()
    model = GPTModel(config, spec, VOCABULARY, 1024, position_embedding_type="rope").cuda()
    install_rotary(model, make_scaling("linear", dim=64, factor=8.0, original_length=512))
    if kernel == "triton":
        use_triton(model)
    return model


def documents():
    from megatron_cream.positions import make_strategy

    """Tokens and position ids, each [1, n]."""
    torch.manual_seed(0)
    found = []
    for i, length in enumerate(LENGTHS):
        strategy = make_strategy("cream", length, 4096, head_lengths=(length // 3,))
        ids = torch.from_numpy(strategy.layout(1, i).position_ids)[None].cuda()
        found.append((torch.randint(VOCABULARY, (1, length), device="cuda"), ids))
    return found


@pytest.mark.parametrize("kernel", ["triton", "te", "unfused"])
def test_packed_equals_one_by_one(kernel):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = build(kernel)
    alone = [model(tokens, ids, None, labels=tokens) for tokens, ids in documents()]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    tokens, ids = (torch.cat(parts, dim=1) for parts in zip(*documents(), strict=True))
    together = model(tokens, ids, None, labels=tokens, packed_seq_params=packed)
    expected = torch.cat(alone, dim=1)
    assert (together - expected).abs().max() < 0.05
    plain = torch.cat([torch.arange(n, device="cuda")[None] for n in LENGTHS], dim=1)
    other = model(tokens, plain, None, labels=tokens, packed_seq_params=packed)
    assert (other - expected).abs().max() > 0.2, "positions must matter"
