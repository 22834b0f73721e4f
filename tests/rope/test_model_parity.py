# SPDX-License-Identifier: Apache-2.0
"""A whole model in transformers and in Megatron: same weights, same position ids, same logits.

Llama rotates all dimensions of a head in halves; GLM a half of them, in interleaved pairs.
"""

import json
import sys

import pytest
import torch

from megatron_cream.rope import hf_rope_fields

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T, LAYERS, HIDDEN, HEADS, GROUPS, HEAD, FFN, VOCABULARY = 64, 512, 2, 64, 4, 2, 32, 96, 128
FLAGS = [
    *("--num-layers", str(LAYERS), "--hidden-size", str(HIDDEN), "--ffn-hidden-size", str(FFN)),
    *("--num-attention-heads", str(HEADS), "--group-query-attention"),
    *("--num-query-groups", str(GROUPS), "--kv-channels", str(HEAD), "--swiglu"),
    *("--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--position-embedding-type", "rope"),
    *(
        "--seq-length",
        str(N),
        "--max-position-embeddings",
        str(N),
        "--target-length",
        str(T),
        "--position-strategy",
        "pose",
    ),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--no-rope-fusion"),
    *("--micro-batch-size", "1", "--train-iters", "1", "--eval-interval", "1", "--lr", "1e-3"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)),
    *("--make-vocab-size-divisible-by", "1", "--no-create-attention-mask-in-dataloader"),
]
GLM = ["--rotary-percent", "0.5", "--rotary-interleaved", "--add-qkv-bias"]


def megatron_model(monkeypatch, flags):
    """The model as training and evaluation build it, and the scaling it turns by."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_args, validate_args

    from megatron_cream.mcore.argument_table import cpu_flags
    from megatron_cream.mcore.build_model import initialize_ranks
    from megatron_cream.mcore.hooks import model_config
    from megatron_cream.training import arguments

    monkeypatch.setattr(sys, "argv", ["pretrain", *cpu_flags(), "--cpu", *FLAGS, *flags])
    args = parse_args(arguments.add_arguments)
    validate_args(args)
    initialize_ranks()
    config = model_config(args, arguments.extension_from_args(args))
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return model.eval(), model.rotary_pos_emb.scaling


def hf_model(scaling, glm):
    kind = transformers.GlmForCausalLM if glm else transformers.LlamaForCausalLM
    fields = json.loads(json.dumps(hf_rope_fields(scaling, T, head_dim=HEAD)))
    config = kind.config_class(
        **fields,
        **{"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN},
        **{"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD},
        **{"vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "initializer_range": 0.1},
        **{"pad_token_id": None, "attention_bias": glm},
    )
    torch.manual_seed(1)
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def copy_weights(hf, megatron):
    weights = {k: v for k, v in megatron.state_dict().items() if torch.is_tensor(v)}
    found = dict(hf.named_parameters())
    layer = "decoder.layers.{}."
    rows = {
        "embedding.word_embeddings.weight": found["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": found["model.norm.weight"],
        "output_layer.weight": found["lm_head.weight"],
    }
    for i in range(LAYERS):
        here, there = layer.format(i), f"model.layers.{i}."
        one = {k.removeprefix(there): v for k, v in found.items() if k.startswith(there)}
        rows[here + "input_layernorm.weight"] = one["input_layernorm.weight"]
        rows[here + "pre_mlp_layernorm.weight"] = one["post_attention_layernorm.weight"]
        rows[here + "self_attention.linear_proj.weight"] = one["self_attn.o_proj.weight"]
        rows[here + "mlp.linear_fc2.weight"] = one["mlp.down_proj.weight"]
        gate_up = one.get("mlp.gate_up_proj.weight")
        if gate_up is None:
            gate_up = torch.cat((one["mlp.gate_proj.weight"], one["mlp.up_proj.weight"]))
        rows[here + "mlp.linear_fc1.weight"] = gate_up
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in one:
                rows[here + f"self_attention.linear_qkv.{kind}"] = by_group(
                    *(one[f"self_attn.{x}_proj.{kind}"] for x in "qkv")
                )
    assert set(rows) == set(weights)
    with torch.no_grad():
        for name, value in rows.items():
            weights[name].copy_(value)


def by_group(q, k, v):
    """Megatron keeps the queries of a group beside its key and value."""
    parts = [t.reshape(GROUPS, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def random_ids(batch, target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(target, generator=generator)[:N].sort().values for _ in range(batch)]
    ids = torch.stack(ids)
    ids[:, -1] = target - 1  # what transformers takes the length of the sequence from
    return ids


@torch.no_grad()
def both_logits(hf, megatron, position_ids):
    tokens = torch.randint(VOCABULARY, position_ids.shape, generator=torch.manual_seed(2))
    # Without a mask transformers takes jumps of position ids for borders of packed texts.
    mask = torch.ones_like(tokens)
    theirs = hf(input_ids=tokens, position_ids=position_ids, attention_mask=mask).logits
    ours = megatron(input_ids=tokens, position_ids=position_ids, attention_mask=None)
    return ours, theirs


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Builds both models with the same flags and returns their logits."""

    def compare(flags, glm=False, batch=2, target=T, length=None):
        megatron, scaling = megatron_model(monkeypatch, [*flags, *(GLM if glm else [])])
        hf = hf_model(scaling, glm)
        copy_weights(hf, megatron)
        if length is not None:
            megatron.rotary_pos_emb.set_length(length)
        return *both_logits(hf, megatron, random_ids(batch, target)), scaling

    return compare


@pytest.fixture
def factors_file(tmp_path):
    def write(dim):
        pairs = range(dim // 2)
        lists = {"short_factor": [1.0] * len(pairs), "long_factor": [1.0 + i / 2 for i in pairs]}
        path = tmp_path / "factors.json"
        path.write_text(json.dumps(lists))
        return ["--rope-interpolation", "longrope", "--rope-factors-file", str(path)]

    return write


def assert_same(ours, theirs):
    print(f"largest difference {(ours - theirs).abs().max():.2e} of {theirs.abs().max():.2f}")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


INTERPOLATIONS = {
    "none": ["--rope-interpolation", "none"],
    "linear": ["--rope-interpolation", "linear", "--rope-factor", "2.5"],
    "ntk": ["--rope-interpolation", "ntk"],
    "theta": ["--rope-theta", "5e5"],
    "yarn": ["--rope-interpolation", "yarn"],
    "yarn, options": ["--rope-interpolation", "yarn", "--rope-options", "attention_factor=1.5"],
    "yarn-pose": ["--rope-interpolation", "yarn-pose"],
    "llama3": ["--rope-interpolation", "llama3"],
}


@pytest.mark.parametrize("glm", [False, True], ids=["llama", "glm"])
@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_logits(compared, name, glm):
    ours, theirs, _ = compared(INTERPOLATIONS[name], glm)
    assert_same(ours, theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("glm", [False, True], ids=["llama", "glm"])
def test_logits_at_other_micro_batch_sizes(compared, glm, batch):
    assert_same(*compared(INTERPOLATIONS["yarn"], glm, batch)[:2])


@pytest.mark.parametrize("glm", [False, True], ids=["llama", "glm"])
def test_longrope_takes_the_list_that_is_served(compared, factors_file, glm):
    flags = factors_file(HEAD // 2 if glm else HEAD)
    assert_same(*compared(flags, glm)[:2])
    assert_same(*compared(flags, glm, target=N, length=N)[:2])


@pytest.mark.parametrize("glm", [False, True], ids=["llama", "glm"])
@pytest.mark.parametrize("name", ["linear", "theta", "yarn", "yarn, options"])
def test_mixed_windows_are_served_by_length(compared, name, glm):
    flags = [*INTERPOLATIONS[name], "--mixed-windows", "--plain-share", "0.5"]
    assert_same(*compared(flags, glm)[:2])
    assert_same(*compared(flags, glm, target=N, length=N)[:2])
    assert_same(*compared(flags, glm, target=N + 1, length=N + 1)[:2])


def test_the_factors_of_longrope_are_felt(compared, factors_file):
    flags = factors_file(HEAD)
    ours, theirs, _ = compared(flags, target=N)  # trained as for T, served as for N
    assert (ours - theirs).abs().max() > 1e-3


def test_on_top_of_a_scaled_base(compared, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    base = {"head_dim": HEAD, "max_position_embeddings": N, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(base))
    flags = ["--rope-interpolation", "linear", "--rope-base-config", str(tmp_path / "config.json")]
    ours, theirs, scaling = compared(flags)
    assert_same(ours, theirs)
    assert scaling.divisors.max() == pytest.approx(32.0)


@pytest.mark.parametrize("glm", [False, True], ids=["llama", "glm"])
def test_attention_factor_is_applied_once_and_where_it_costs_nothing(monkeypatch, glm):
    flags = [*INTERPOLATIONS["yarn, options"], *(GLM if glm else [])]
    model, scaling = megatron_model(monkeypatch, flags)
    assert scaling.attention_factor == 1.5
    attention = model.decoder.layers[0].self_attention
    in_softmax = attention.core_attention.softmax_scale * HEAD**0.5
    with_rotation = attention._yarn_concentration_factor
    expected = (1.0, 1.5) if glm else (1.5**2, 1.0)
    assert (in_softmax, with_rotation) == pytest.approx(expected)


@torch.no_grad()
def test_tokens_one_by_one_in_an_inference_context_are_those_of_a_whole_pass(monkeypatch):
    """Megatron's inference asks for the angles of a length, and takes the rows of its tokens."""
    from megatron.core.inference.contexts import StaticInferenceContext

    model, _ = megatron_model(monkeypatch, ["--rope-interpolation", "linear"])
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.manual_seed(3))
    ids = torch.arange(24).expand(2, -1)
    whole = model(input_ids=tokens, position_ids=ids, attention_mask=None)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=24)
    found = []
    for part in (slice(0, 10), *(slice(i, i + 1) for i in range(10, 24))):
        logits = model(
            input_ids=tokens[:, part],
            position_ids=ids[:, part],
            attention_mask=None,
            inference_context=context,
            runtime_gather_output=True,
        )
        context.increment_sequence_len_offset(logits.shape[1])
        found.append(logits)
    context.reset()
    torch.testing.assert_close(found[0][:, -1], whole[:, 9], atol=1e-5, rtol=1e-5)
    for step, logits in enumerate(found[1:], start=10):
        torch.testing.assert_close(logits[:, -1], whole[:, step], atol=1e-5, rtol=1e-5)
    again = model(input_ids=tokens, position_ids=ids, attention_mask=None)
    assert torch.equal(again, whole), "training's angles come back after inference"
