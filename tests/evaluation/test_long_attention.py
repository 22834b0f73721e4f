# SPDX-License-Identifier: Apache-2.0
"""--dual-chunk, --string, --self-extend: models score as with the papers' dense softmax."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from support import forks, hf_models
from support.arguments import arguments
from support.dense_attention import (
    dense,
    dual_chunk_distance,
    self_extend_distance,
    string_distance,
)
from transformers import AttentionInterface, AutoModelForCausalLM

from megatron_cream.attention.bands import dual_chunk
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluate import open_model
from megatron_cream.evaluation.forward import ForwardPass
from megatron_cream.evaluation.long_attention import BeyondWindow
from megatron_cream.rope import make_scaling, scaling_from_hf

METHODS = {
    "dual_chunk": (["chunk_size=48", "local_size=8"], dual_chunk_distance),
    "string": (["shift=30", "local_size=7"], string_distance),
    "self_extend": (["group_size=4", "window=21"], self_extend_distance),
}
CONTEXT, TAIL, TOKENS = 100, 3, 119


class Unrotated(torch.nn.Module):
    def forward(self, x, *_, **__):
        return torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])


def dense_model(folder, distance, factor=1.0):
    """transformers' own model around the dense attention, its logits multiplied by a factor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    scaling = scaling_from_hf(model.config.to_dict())

    def attention(module, q, k, v, mask, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dense(q * factor, k, v, scaling, distance, (q.shape[1],)), None

    AttentionInterface.register("dense", attention)
    model.set_attn_implementation("dense")
    model.model.rotary_emb = Unrotated()
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def written(model, prompt, count):
    """What greedy decoding by whole passes writes."""
    tokens = torch.from_numpy(prompt)[None]
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:, :].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].numpy()


@pytest.fixture(scope="module", params=["Llama", "Mistral, no window", "Qwen3, q and k norm"])
def folder(request, tmp_path_factory):
    return str(hf_models.make(tmp_path_factory.mktemp("hf"), request.param))


@pytest.fixture
def opened(folder):
    def open_with(name, **changes):
        given = {name: METHODS[name][0], "lengths": [TOKENS], "dtype": "float32", **changes}
        return open_model(arguments(hf=folder, **given))

    return open_with


@pytest.mark.parametrize("name", METHODS)
def test_whole_passes_tails_and_decoding(name, folder, opened):
    model, reference = opened(name), dense_model(folder, METHODS[name][1])
    tokens = torch.randint(3, 120, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    wanted = logits_of(reference, tokens)
    head = model.module.get_output_embeddings()
    plain = ForwardPass(tokens, torch.arange(TOKENS), tokens)
    torch.testing.assert_close(head(model.hidden(plain)).double(), wanted, atol=1e-4, rtol=1e-4)
    shared = torch.cat([tokens[:, :CONTEXT], tokens[:, 7 : 7 + 2 * TAIL]], dim=1)
    one = ForwardPass(shared, torch.arange(CONTEXT, CONTEXT + 2 * TAIL), shared, tails=2, tail=TAIL)
    found = head(model.hidden(one)[:, CONTEXT:]).double()
    for i in range(2):
        start = CONTEXT + i * TAIL
        alone = torch.cat([tokens[:, :CONTEXT], shared[:, start : start + TAIL]], dim=1)
        own = found[:, i * TAIL : (i + 1) * TAIL]
        torch.testing.assert_close(own, logits_of(reference, alone)[:, CONTEXT:],
                                   atol=1e-4, rtol=1e-4)  # fmt: skip
    prompts = [tokens[0, :n].numpy() for n in (61, 97, 90)]
    for prompt, answer in zip(prompts, model.generate(prompts, [4] * 3, ()), strict=True):
        assert np.array_equal(answer, written(reference, prompt, 4))


def test_logits_have_the_factor_of_the_length_that_each_text_has(folder, opened):
    """Whole texts, tails as if each followed the context alone, and the first decoded token."""
    original = 30
    sizes = [*METHODS["dual_chunk"][0], f"original_max_position_embeddings={original}"]
    model = opened("dual_chunk", dual_chunk=sizes)

    def wanted(tokens):
        factor = 0.1 * math.log(tokens.shape[1] / original) + 1.0
        return logits_of(dense_model(folder, dual_chunk_distance, factor**2), tokens)

    tokens = torch.randint(3, 120, (1, CONTEXT + 2 * TAIL))
    head, close = model.module.get_output_embeddings(), {"atol": 1e-4, "rtol": 1e-4}
    plain = ForwardPass(tokens, torch.arange(tokens.shape[1]), tokens)
    whole = head(model.hidden(plain)).double()
    torch.testing.assert_close(whole, wanted(tokens), **close)
    assert (whole - logits_of(dense_model(folder, dual_chunk_distance), tokens)).abs().max() > 1e-3
    one = ForwardPass(tokens, torch.arange(CONTEXT, CONTEXT + 2 * TAIL), tokens, tails=2, tail=TAIL)
    found = head(model.hidden(one)[:, CONTEXT:]).double()
    for i in range(2):
        start = CONTEXT + i * TAIL
        alone = torch.cat([tokens[:, :CONTEXT], tokens[:, start : start + TAIL]], dim=1)
        own = found[:, i * TAIL : (i + 1) * TAIL]
        torch.testing.assert_close(own, wanted(alone)[:, CONTEXT:], **close)


def test_kept_keys_have_the_factor_of_the_text_so_far():
    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    beyond = BeyondWindow(dual_chunk(48, 8, 30), scaling)
    q, k, v = (torch.randn(1, heads, 119, 16, dtype=torch.float64) for heads in (4, 2, 2))
    whole = beyond.attend(q, k, v, 0.25)
    torch.testing.assert_close(beyond.attend(q[:, :, -3:], k, v, 0.25), whole[:, :, -3:])


def attend_over_ranks(ranks):
    """What evaluation's attention gives for the tokens of this rank."""
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    beyond = BeyondWindow(dual_chunk(48, 8, 30), scaling, group=group if ranks > 1 else None)
    generator = torch.Generator().manual_seed(1)
    pieces = torch.arange(136).chunk(2 * ranks)
    own = torch.cat((pieces[rank], pieces[2 * ranks - 1 - rank]))
    shapes = [(1, heads, 136, 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    return own.numpy(), beyond.attend(*(x[:, :, own] for x in (q, k, v)), 0.25).numpy()


def test_context_parallel_ranks_attend_as_one():
    (one,), two = (forks.call_ranks(n, attend_over_ranks, n) for n in (1, 2))
    own = np.concatenate([places for places, _ in two])
    out = np.concatenate([out for _, out in two], axis=2)
    np.testing.assert_allclose(out[:, :, own.argsort()], one[1], atol=1e-11)


def test_over_another_rope_it_counts_from_the_longer_window(opened):
    model = opened("dual_chunk", dual_chunk=[], rope_interpolation="yarn", rope_factor=4.0)
    window = 4 * 96
    assert model.settings["attention"] == {
        "name": "dual_chunk",
        "chunk_size": 3 * window // 4,
        "local_size": window // 8,
        "original_max_position_embeddings": 0,
    }
    assert model.settings["rope"]["rope_type"] == "yarn"
    assert model.module.model.layers[0].self_attn.beyond_window.scaling.attention_factor > 1.1


def test_sizes_of_the_model_and_of_the_text(folder, tmp_path):
    own = {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 40}
    shutil.copytree(folder, tmp_path / "hf")
    hf_models.edit_config(tmp_path / "hf", dual_chunk_attention_config=own)
    sizes = [
        open_model(arguments(hf=path, lengths=[400], **flag)).settings["attention"]
        for path, flag in (
            (str(tmp_path / "hf"), {"dual_chunk": []}),
            (folder, {"string": []}),
            (folder, {"self_extend": []}),
        )
    ]
    assert sizes == [
        {"name": "dual_chunk", **own},
        {"name": "string", "shift": 32, "local_size": 32},
        {"name": "self_extend", "group_size": 6, "window": 24},
    ]
    assert 24 + (400 - 24) / 6 <= 96, "the longest text is within the window"


def refuses(match, **given):
    settings = arguments(tasks=["passkey"], lengths=[64], **given)
    with pytest.raises(UserError, match=match) as error:
        settings.validate()
        open_model(settings)
    assert "\n" not in str(error.value)


def test_mistakes_are_one_line(folder, tmp_path):
    refuses("--dual-chunk and --string are given", hf=folder, dual_chunk=[], string=[])
    refuses(r"--string has 'w=3': it must be KEY=N .* shift, local_size", hf=folder, string=["w=3"])
    refuses("--dual-chunk has 'chunk_size=x'", hf=folder, dual_chunk=["chunk_size=x"])
    refuses("--dual-chunk: local_size is 90", hf=folder, dual_chunk=["local_size=90"])
    refuses("--self-extend with --context-parallel-size 2", hf=folder, self_extend=[],
            context_parallel_size=2)  # fmt: skip
    refuses("--string with --hf .*, dynamic.*--rope-interpolation", hf=folder, string=[],
            rope_interpolation="dynamic", rope_factor=4.0)  # fmt: skip
    slides = str(hf_models.make(tmp_path / "slides", "Mistral, window of 24"))
    refuses("without a sliding window; it is MistralForCausalLM", hf=slides, dual_chunk=[])


def test_an_export_names_its_sizes_and_evaluation_takes_them(tmp_path, cpu_megatron):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = hf_models.make(tmp_path / "hf", "Qwen2, biases on q, k, v")
    import_checkpoint(str(folder), str(tmp_path / "checkpoint"), quiet=True)
    with pytest.raises(UserError, match="--dual-chunk: local_size is 60"):
        export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "out"),
                          dual_chunk=["local_size=60"])  # fmt: skip
    words = ["local_size=16", "original_max_position_embeddings=50"]
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "out"), quiet=True,
                      dual_chunk=words)  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {"chunk_size": 72, "local_size": 16, "original_max_position_embeddings": 50}
    assert written["dual_chunk_attention_config"] == sizes
    again = open_model(arguments(hf=str(tmp_path / "out"), dual_chunk=[]))
    assert again.settings["attention"] == {"name": "dual_chunk", **sizes}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_scores_as_its_export(name, tmp_path, cpu_megatron):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = hf_models.make(tmp_path / "hf", "Llama")
    config = json.loads((folder / "config.json").read_text())
    own = {"original_max_position_embeddings": 50}
    if name == "dual_chunk":  # its factor on logits goes along
        hf_models.edit_config(folder, dual_chunk_attention_config=own)
    import_checkpoint(str(folder), str(tmp_path / "checkpoint"))
    given = {name: METHODS[name][0], "lengths": [TOKENS]}
    rope = {"rope_interpolation": "yarn", "rope_factor": 2.0}
    tokens = torch.randint(3, config["vocab_size"], (1, TOKENS))
    one = ForwardPass(tokens, torch.arange(TOKENS), tokens.roll(1))
    places = {"hf": str(folder)}, {"checkpoint": str(tmp_path / "checkpoint")}
    models = [open_model(arguments(**place, **given, **rope)) for place in places]
    assert models[0].settings["attention"] == models[1].settings["attention"]
    assert name != "dual_chunk" or models[1].settings["attention"].items() >= own.items()
    scores = [next(iter(model.run(iter([one])))) for model in models]
    torch.testing.assert_close(scores[0].logprobs, scores[1].logprobs, atol=1e-4, rtol=1e-4)
    prompts = [tokens[0, :n].numpy() for n in (61, 97, 90)]
    theirs, ours = ([*model.generate(prompts, [6] * 3, ())] for model in models)
    assert [one.tolist() for one in ours] == [one.tolist() for one in theirs]
