# SPDX-License-Identifier: Apache-2.0
"""--dual-chunk: a step's loss and gradients are those of the dense softmax, and what is refused."""

import os
from argparse import Namespace
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import forks, ranks
from support.arguments import arguments
from support.dense_attention import LOCAL, Q, dense, dual_chunk_distance
from support.evaluation import write_small_hf
from support.runs import write_dataset

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.evaluation.forward import ForwardPass
from megatron_cream.extras import dual_chunk
from megatron_cream.parallel_layout import ParallelLayout

pytestmark = pytest.mark.usefixtures("cpu_megatron")

TOKENS, VOCABULARY = 137, 64
CONFIG = Namespace(rotary_interleaved=False, softmax_scale=None, kv_channels=16)


class DenseCore(torch.nn.Module):
    def __init__(self, scaling, interleaved):
        super().__init__()
        self.scaling, self.interleaved = scaling, interleaved

    def forward(self, query, key, value, *_, **__):
        q, k, v = (x.transpose(0, 1).double() for x in (query, key, value))
        out = dense(q, k, v, self.scaling, dual_chunk_distance, (TOKENS,), self.interleaved)
        return out.transpose(0, 1).flatten(2).to(query.dtype)


def build(in_softmax, interleaved, ranks=1):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.mcore.build_model import initialize_ranks
    from megatron_cream.mcore.rotary import fold_attention_factor_into_softmax, install_rotary
    from megatron_cream.rope import make_scaling

    initialize_ranks(ParallelLayout(context=ranks))
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False,
        init_method_std=0.1, use_cpu_initialization=True, rotary_interleaved=interleaved,
    )  # fmt: skip
    scaling = make_scaling("yarn", dim=16, base=100.0, factor=4.0, original_length=16)
    if in_softmax:
        assert fold_attention_factor_into_softmax(config, scaling)
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, VOCABULARY, 256, position_embedding_type="rope")
    install_rotary(model, scaling, attention_factor_in_softmax=in_softmax)
    dual_chunk.use_dual_chunk(model, chunk_size=Q, local_size=LOCAL)
    return model, scaling


def step(exact, in_softmax, interleaved):
    """Loss per token and gradients of one step, with the dense softmax or ours."""
    model, scaling = build(in_softmax, interleaved)
    if exact:
        for layer in model.decoder.layers:
            layer.self_attention.core_attention = DenseCore(scaling, interleaved)
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    ids = torch.arange(TOKENS).expand(2, -1)
    loss = model(input_ids=tokens, position_ids=ids, attention_mask=None, labels=tokens)
    loss.mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach().numpy(), *(g.numpy() for g in gradients)]


def both(in_softmax, interleaved):
    return step(True, in_softmax, interleaved), step(False, in_softmax, interleaved)


@pytest.mark.parametrize(("in_softmax", "interleaved"), [(True, False), (False, True)])
def test_a_step_is_that_of_the_dense_softmax(in_softmax, interleaved):
    wanted, found = forks.call(both, in_softmax, interleaved)
    assert len(wanted) == len(found) > 10
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(*map(torch.from_numpy, (one, other)), atol=1e-5, rtol=1e-3)


@torch.no_grad()
def decode(in_softmax):
    """Logits of a whole pass, and of Megatron's static inference, a few tokens and one by one."""
    from megatron.core.inference.contexts import StaticInferenceContext

    model, _ = build(in_softmax, False)
    model.eval()
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    ids = torch.arange(TOKENS).expand(2, -1)
    whole = model(input_ids=tokens, position_ids=ids, attention_mask=None)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=TOKENS)
    found = []
    for begin, end in pairwise([0, 51, 58, *range(59, TOKENS + 1)]):
        logits = model(
            input_ids=tokens[:, begin:end], position_ids=ids[:, begin:end], attention_mask=None,
            inference_context=context,
        )  # fmt: skip
        context.increment_sequence_len_offset(end - begin)
        found.append(logits)
    context.reset()
    said = []
    for static, flash in ((True, True), (False, False)):
        model.config.flash_decode = flash
        context.is_static_batching = lambda static=static: static
        try:
            layer = model.decoder.layers[0].self_attention
            layer(torch.zeros(1, 2, 64), None, inference_context=context)
        except UserError as error:
            said.append(str(error))
    return whole.numpy(), torch.cat(found, dim=1).numpy(), said


@pytest.mark.parametrize("in_softmax", [True, False])
def test_megatrons_static_inference_decodes_what_a_whole_pass_gives(in_softmax):
    whole, found, said = forks.call(decode, in_softmax)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(found, whole, atol=1e-5, rtol=1e-4)
    assert len(said) == 2 and all("must have a static context" in one for one in said)


def own_tokens(lengths, rank, ranks):
    """Where the tokens of a rank are: pieces r and 2 CP - 1 - r of every document."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    pieces = [torch.arange(a, b).chunk(2 * ranks) for a, b in pairwise(starts)]
    return torch.cat([torch.cat((x[rank], x[2 * ranks - 1 - rank])) for x in pieces])


def context_step(ranks):
    """Loss per token and gradients of one step whose sequence is dealt out over ranks."""
    model, _ = build(False, False, ranks)
    model.config.context_parallel_size = ranks  # built with 1, which Megatron's CPU attention needs
    own = own_tokens((TOKENS - 1,), int(os.environ["RANK"]), ranks)
    tokens = torch.randint(VOCABULARY, (2, TOKENS - 1))[:, own]
    ids = own.expand(2, -1)
    loss = model(input_ids=tokens, position_ids=ids, attention_mask=None, labels=tokens)
    loss.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    return own.numpy(), loss.detach().numpy(), [g.numpy() for g in gradients]


def packed_pass(ranks):
    """Output and gradients of q, k, v of packed documents, this rank's tokens."""
    from megatron_cream.rope import make_scaling

    torch.distributed.init_process_group("gloo")
    lengths = (48, 4, 92, 16)
    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    core = dual_chunk.DualChunkCore(
        CONFIG, scaling, {"chunk_size": Q, "local_size": LOCAL}, False,
        torch.distributed.group.WORLD,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    own = own_tokens(lengths, torch.distributed.get_rank(), ranks)
    shapes = [(sum(lengths), heads, 16) for heads in (4, 2, 2, 4)]
    whole = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    *tensors, weight = (x[own].requires_grad_() for x in whole)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = Namespace(cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    out = core(*tensors, packed_seq_params=packed)
    gradients = torch.autograd.grad((out * weight.flatten(1)).sum(), tensors)
    return own.numpy(), *(x.detach().numpy() for x in (out, *gradients))


def joined(parts):
    """The values of all ranks' tokens in the order of the sequence."""
    own, values = (np.concatenate(x) for x in zip(*parts, strict=True))
    return values[own.argsort()]


def test_context_parallel_ranks_take_the_step_of_one():
    (one,), two = forks.call_ranks(1, context_step, 1), forks.call_ranks(2, context_step, 2)
    losses = joined([(own, loss.T) for own, loss, _ in two])
    np.testing.assert_allclose(losses, one[1].T, atol=1e-5, rtol=1e-4)
    assert len(one[2]) > 10
    for found, wanted in zip(two[0][2], one[2], strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-3)


def test_packed_documents_over_context_parallel_ranks():
    (one,), two = forks.call_ranks(1, packed_pass, 1), forks.call_ranks(2, packed_pass, 2)
    for i in range(1, 5):
        np.testing.assert_allclose(joined([(x[0], x[i]) for x in two]), one[i], atol=1e-11)


def test_packed_documents_begin_anew():
    from megatron_cream.rope import make_scaling

    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    core = dual_chunk.DualChunkCore(
        CONFIG, scaling, {"chunk_size": Q, "local_size": LOCAL}, False
    )  # fmt: skip
    q, k, v = (torch.randn(160, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    ends = torch.tensor([0, 43, 44, 160], dtype=torch.int32)
    packed = Namespace(cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    found = core(q, k, v, packed_seq_params=packed)
    wanted = dense(q[None], k[None], v[None], scaling, dual_chunk_distance, (43, 1, 116))
    torch.testing.assert_close(found, wanted[0].flatten(1), atol=1e-12, rtol=0)
    other = Namespace(cu_seqlens_q=torch.tensor([0, 100, 160]), cu_seqlens_q_padded=None)
    found = core(q, k, v, packed_seq_params=other)  # the next micro-batch has lengths of its own
    wanted = dense(q[None], k[None], v[None], scaling, dual_chunk_distance, (100, 60))
    torch.testing.assert_close(found, wanted[0].flatten(1), atol=1e-12, rtol=0)
    single = core(q.float(), k.float(), v.float(), packed_seq_params=other)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, atol=1e-5, rtol=0)


def args(**given):
    plain = {
        "dual_chunk": [], "context_parallel_size": 1, "attention_dropout": 0.0,
        "window_size": None, "softmax_type": "vanilla", "hybrid_layer_pattern": None,
        "no_rope_freq": None,
    }  # fmt: skip
    return Namespace(**plain | given)


LONG = {"train_length": 16384, "target_length": 16384, "original_length": 4096, "rope_factor": 4.0}


def test_a_run_says_so_and_evaluation_and_export_follow(tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.evaluation.evaluate import open_model

    source = write_small_hf(tmp_path / "hf")
    import_checkpoint(source, str(tmp_path / "import"), quiet=True)
    text = write_dataset(tmp_path / "text", [2400] * 8, vocabulary=300)
    run = ranks.train(tmp_path / "log", [
        *("--pretrained-checkpoint", str(tmp_path / "import"), "--use-checkpoint-args"),
        *("--save", str(tmp_path / "run"), "--data-path", text, "--split", "100,0,0"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "384", "--num-workers", "0"),
        *("--seq-length", "1024", "--max-position-embeddings", "1024"),
        *("--original-length", "512", "--rope-interpolation", "none"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--save-interval", "1"),
        *("--train-iters", "1", "--lr", "1e-3", "--eval-iters", "0", "--eval-interval", "9"),
        *("--no-create-attention-mask-in-dataloader", "--attention-dropout", "0"),
        *("--dual-chunk", "original_max_position_embeddings=600"),
    ])  # fmt: skip
    assert run.lines("rope kernel")[0].endswith("dual chunk attention's own")
    sizes = {"chunk_size": 384, "local_size": 64, "original_max_position_embeddings": 600}
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), quiet=True)
    tokens = torch.randint(3, 300, (1, 900), generator=torch.Generator().manual_seed(1))
    one = ForwardPass(tokens, torch.arange(900), tokens.roll(1))
    scores = []
    for place, flags in (("run", {}), ("out", {"dual_chunk": []})):
        kind = "checkpoint" if place == "run" else "hf"
        model = open_model(arguments(**{kind: str(tmp_path / place)}, **flags))
        assert model.settings["attention"] == {"name": "dual_chunk", **sizes}
        scores.append(next(iter(model.run(iter([one])))).logprobs)
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_sizes_by_the_window_that_rope_reaches():
    config = Namespace(pre_wrap_hooks=[])
    for name, sizes in (("none", [3072, 512]), ("linear", [12288, 2048])):
        given, config.pre_wrap_hooks = args(), []
        extension = ExtensionConfig(**LONG, rope_interpolation=name)
        for _ in range(2):
            dual_chunk.EXTRA.configure(config, given, extension)
        assert given.dual_chunk == [
            f"chunk_size={sizes[0]}",
            f"local_size={sizes[1]}",
            "original_max_position_embeddings=0",
        ]
        assert len(config.pre_wrap_hooks) == 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"attention_dropout": 0.1}, "--attention-dropout is 0.1 .* be 0.0"),
        ({"window_size": (64, 0)}, "--window-size is .* left out"),
        ({"no_rope_freq": 4}, "--no-rope-freq is 4 with --dual-chunk: .* left out"),
        ({"dual_chunk": ["local_size=9000"]}, "--dual-chunk: local_size is 9000"),
        ({"hybrid_layer_pattern": "*-"}, "--hybrid-layer-pattern"),
    ],
)
def test_what_it_does_not_go_with(given, match):
    extension = ExtensionConfig(**LONG, rope_interpolation="none")
    dual_chunk.EXTRA.validate_flags(args(), extension)
    with pytest.raises(UserError, match=match):
        dual_chunk.EXTRA.validate_flags(args(**given), extension)


def test_other_positions_are_refused():
    extension = ExtensionConfig(96, 768, 96, position_strategy="cream", rope_interpolation="none")
    with pytest.raises(UserError, match="--position-strategy is cream .* be full"):
        dual_chunk.EXTRA.validate_flags(args(), extension)
