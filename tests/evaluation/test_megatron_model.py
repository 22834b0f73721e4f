# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint scores as the Hugging Face model it came from, at any TP and PP."""

import json

import numpy as np
import pytest
import torch
from support.arguments import arguments
from support.evaluation import run, scored_lines
from support.ranks import call
from support.runs import write_dataset
from transformers import AutoModelForCausalLM

from megatron_cream.evaluation.forward import ForwardPass
from megatron_cream.evaluation.result_files import read_result

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}
CASES = {"lengths": [384], "cases": 3, "seeds": 2}


@pytest.fixture(scope="module")
def checkpoint(small_hf, tmp_path_factory):
    """The small model as a Megatron checkpoint; its vocabulary is padded there."""
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("megatron") / "import"
    import_checkpoint(small_hf, str(folder), quiet=True)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("text") / "text", [300] * 3, vocabulary=384)


def lines(folder):
    with open(f"{folder}/cases.jsonl") as file:
        found = [json.loads(line) for line in file]
    for record in found:
        record.pop("seal")  # of the settings, which name the model
    return sorted(found, key=lambda record: json.dumps(record)[:60])


@pytest.fixture(scope="module")
def from_hf(small_hf, text, tmp_path_factory):
    """What transformers' model scores: cases, and perplexity."""

    folder = tmp_path_factory.mktemp("from-hf")
    run(arguments(tasks=["longchat-lines"], hf=small_hf, output=f"{folder}/cases", **CASES))
    run(arguments(hf=small_hf, data=text, documents=3, output=f"{folder}/perplexity"))
    return folder


def agree(found, wanted):
    assert len(found) == len(wanted) > 0
    for left, right in zip(found, wanted, strict=True):
        for key, value in right.items():
            if key in ("logprob", "nll"):
                np.testing.assert_allclose(left[key], value, rtol=1e-4)
            else:
                assert left[key] == value, key


@pytest.mark.usefixtures("cpu_megatron")
def test_one_process(checkpoint, from_hf, text, tmp_path):

    run(
        arguments(
            tasks=["longchat-lines"], checkpoint=checkpoint, output=f"{tmp_path}/cases", **CASES
        )
    )
    run(arguments(checkpoint=checkpoint, data=text, documents=3, output=f"{tmp_path}/perplexity"))
    for part in ("cases", "perplexity"):
        agree(lines(tmp_path / part), lines(from_hf / part))


@pytest.mark.usefixtures("cpu_megatron")
def test_more_tokens_named_than_there_are_rows(checkpoint, from_hf, text, tmp_path, monkeypatch):
    """As a run saves it whose --vocab-size is above its tokenizer's: no rows of zeros are added."""
    from megatron_cream.checkpoint import loading

    def saved(folder):
        args = require_arguments(folder)
        args.vocab_size = args.padded_vocab_size + 100
        return args

    require_arguments = loading.require_arguments
    monkeypatch.setattr(loading, "require_arguments", saved)
    run(arguments(checkpoint=checkpoint, data=text, documents=3, output=f"{tmp_path}/perplexity"))
    agree(lines(tmp_path / "perplexity"), lines(from_hf / "perplexity"))


MOST = [24, 24, 3, 24]  # tokens to write after each prompt


def given():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 384, size=length) for length in (40, 1, 57, 300)]


def write(folder, layout, stop, file):
    """What a checkpoint writes after prompts: all at once, two at a time, and one by itself."""
    from megatron_cream.mcore import cpu

    cpu.install()
    from megatron_cream.evaluation import generation
    from megatron_cream.evaluation.evaluate import open_model

    tensor, pipeline = layout
    model = open_model(
        arguments(
            checkpoint=folder,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
        )
    )
    found = []
    for generation._MOST_ROWS in (4, 2):
        found.append([written.tolist() for written in model.generate(given(), MOST, [stop])])
    found.append(list(model.write(given()[3], 5)))
    if model.primary:
        with open(file, "w") as output:
            json.dump(found, output)


@pytest.fixture(scope="module")
def from_generate(small_hf):
    """What transformers' own model with its own attention writes, one prompt at a time."""
    module = AutoModelForCausalLM.from_pretrained(small_hf, attn_implementation="sdpa")
    module.generation_config.eos_token_id = None
    found = []
    for prompt, most in zip(given(), MOST, strict=True):
        tokens = torch.from_numpy(prompt)[None]
        made = module.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_every_token_is_generates(checkpoint, from_generate, tmp_path, layout):
    ranks, stop = layout[0] * layout[1], from_generate[0][5]
    call(tmp_path, write, ranks, checkpoint, layout, stop, str(tmp_path / "written.json"))
    at_once, in_twos, alone = json.loads((tmp_path / "written.json").read_text())
    wanted = [one[: one.index(stop)] if stop in one else one for one in from_generate]
    assert at_once == in_twos == wanted
    assert len(wanted[0]) <= 5 and max(map(len, wanted)) == 24
    assert alone == from_generate[3][:5]


@pytest.mark.usefixtures("cpu_megatron")
def test_rulers_answers(checkpoint, small_hf, tmp_path):
    settings = {"tasks": ["ruler"], "ruler_tasks": ["fwe"], "lengths": [600], "samples": 1}
    run(arguments(checkpoint=checkpoint, output=f"{tmp_path}/1", **settings))
    run(arguments(hf=small_hf, output=f"{tmp_path}/2", **settings))
    found, wanted = (lines(tmp_path / part) for part in "12")
    assert found == wanted and found[0]["written_tokens"] == 50


@pytest.mark.usefixtures("cpu_megatron")
def test_bfloat16(small_hf, text, tmp_path):
    """A 16-bit model is wrapped in Megatron; it rounds elsewhere than transformers does."""
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    model = AutoModelForCausalLM.from_pretrained(small_hf, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "import"), quiet=True)
    words = {"data": text, "documents": 3}
    run(arguments(hf=str(tmp_path / "hf"), dtype="bfloat16", output=f"{tmp_path}/1", **words))
    run(arguments(checkpoint=str(tmp_path / "import"), output=f"{tmp_path}/2", **words))
    wanted, found = (read_result(tmp_path / part)["lengths"] for part in "12")
    assert len(found) > 0
    for left, right in zip(found, wanted, strict=True):
        assert left["perplexity"] == pytest.approx(right["perplexity"], rel=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(checkpoint, from_hf, tmp_path, layout):
    tensor, pipeline = LAYOUTS[layout]
    settings = CASES | {"output": f"{tmp_path}/cases"}
    ranks = tensor * pipeline
    call(tmp_path, scored_lines, ranks, checkpoint, "longchat-lines", settings, LAYOUTS[layout])
    agree(lines(tmp_path / "cases"), lines(from_hf / "cases"))


def test_perplexity_over_ranks(checkpoint, from_hf, text, tmp_path):
    settings = {"data": text, "documents": 3, "output": f"{tmp_path}/perplexity"}
    call(tmp_path, scored_lines, 2, checkpoint, "perplexity", settings, (2, 1))
    agree(lines(tmp_path / "perplexity"), lines(from_hf / "perplexity"))


def test_number_of_processes(checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="torchrun started 2 processes.*must be 4"):
        call(tmp_path, scored_lines, 2, checkpoint, "needle", CASES, (2, 2))


@pytest.mark.usefixtures("cpu_megatron")
def test_context_parallelism_needs_gpus(checkpoint):
    asked = arguments(tasks=["needle"], checkpoint=checkpoint, context_parallel_size=2, **CASES)
    with pytest.raises(ValueError, match="--context-parallel-size is 2 with --cpu: it must be 1"):
        run(asked)


def make_pass(length=21, rows=(3, 7, 8, 20)):
    tokens = torch.arange(2 * length).view(2, length) + 100
    kept = torch.tensor(rows)
    return ForwardPass(tokens, kept, kept[None] + torch.tensor([[1000], [2000]]))


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_is_on_one_rank(ranks):
    from megatron_cream.evaluation.megatron_model import ContextShard

    one = make_pass()
    shards = [ContextShard(one, rank, ranks) for rank in range(ranks)]
    assert sorted(i for shard in shards for i in shard.which.tolist()) == [0, 1, 2, 3]
    for shard in shards:
        where = shard.positions[:, shard.kept]
        assert torch.equal(where[0], one.rows[shard.which])
        assert torch.equal(shard.targets, one.targets[:, shard.which])
        assert torch.equal(shard.tokens[:, shard.kept], one.tokens[:, where[0]])


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_are_megatrons(ranks, monkeypatch):
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_cream.evaluation.megatron_model import ContextShard

    one, group = make_pass(length=24), object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        batch = {"tokens": one.tokens, "position_ids": one.positions()}
        own = get_batch_on_this_cp_rank(batch, False, cp_group=group)
        shard = ContextShard(one, rank, ranks)
        assert torch.equal(own["tokens"], shard.tokens)
        assert torch.equal(own["position_ids"], shard.positions)
