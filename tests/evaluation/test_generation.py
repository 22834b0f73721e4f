# SPDX-License-Identifier: Apache-2.0
"""What several prompts at once are answered is what transformers' ``generate`` writes for each."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from megatron_cream.evaluation import forward, generation, hf_model
from megatron_cream.evaluation.forward import KEYS_MULTIPLE, ScoringModel
from megatron_cream.evaluation.hf_model import HuggingFaceModel

NEW = 24
LENGTHS = [40, 1, 57, 57, 300, 12]


def prompts(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 384, size=length) for length in lengths]


def theirs(folder, given, new_tokens=NEW, eos=None):
    """What transformers' own model with its own attention writes, one prompt at a time."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    module.generation_config.eos_token_id = None
    found = []
    for prompt in given:
        tokens = torch.from_numpy(prompt)[None]
        made = module.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def ours(model, given, new_tokens=NEW, stop=()):
    most = [new_tokens] * len(given) if isinstance(new_tokens, int) else new_tokens
    return [written.tolist() for written in model.generate(given, most, stop)]


@pytest.fixture(scope="module")
def model(small_hf):
    return HuggingFaceModel(small_hf, "float32", "cpu")


def test_every_token_is_generates(model, small_hf):
    wrote = theirs(small_hf, prompts())
    assert len({tuple(tokens) for tokens in wrote}) == len(LENGTHS)
    assert ours(model, prompts()) == wrote


def test_an_answer_ends_before_the_token_that_stops_it(model, small_hf):
    free = theirs(small_hf, prompts())
    stop = [free[0][5], free[4][0]]
    wrote = theirs(small_hf, prompts(), eos=stop)
    wanted = [tokens[:-1] if tokens[-1] in stop else tokens for tokens in wrote]
    assert wanted[4] == [] and len(wanted[0]) <= 5
    assert ours(model, prompts(), stop=stop) == wanted
    assert max(map(len, wanted)) == NEW  # others go on


def test_batches_that_the_memory_holds(model, monkeypatch):
    at_once = ours(model, prompts())
    sizes = []
    own = generation.decode

    def counted(step, batch, *rest):
        sizes.append(len(batch))
        return own(step, batch, *rest)

    monkeypatch.setattr(generation, "decode", counted)
    # Keys and values of 2 layers of 2 heads of 8 values, 4 bytes each.
    most = 2 * (max(LENGTHS) + NEW + KEYS_MULTIPLE)
    monkeypatch.setattr(generation, "_CPU_MEMORY", most * 2 * 2 * 2 * 8 * 4)
    assert ours(model, prompts()) == at_once
    assert sizes == [2, 2, 2]
    assert ours(model, []) == []


def test_each_prompt_has_its_own_most_tokens(model, small_hf):
    most = [3, 1, NEW, 7, 2, 5]
    wrote = theirs(small_hf, prompts())
    assert ours(model, prompts(), most) == [
        tokens[:n] for tokens, n in zip(wrote, most, strict=True)
    ]


def test_keys_in_parts_are_the_same_attention(model, monkeypatch):
    """As a GPU cuts them where there are few sequences; in some parts nothing is seen."""
    whole = ours(model, prompts())
    monkeypatch.setattr(forward, "_splits", lambda *_: 8)
    assert ours(model, prompts()) == whole


def test_passes_without_a_cache_write_the_same(model, small_hf):
    given = prompts()[:3]
    wrote = theirs(small_hf, given, 6)
    stop = [wrote[1][2]]
    found = [tokens.tolist() for tokens in ScoringModel.generate(model, given, [6] * 3, [])]
    assert found == wrote
    (stopped,) = ScoringModel.generate(model, given[1:2], [6], stop)
    assert stopped.tolist() == wrote[1][: wrote[1].index(stop[0])]


SHAPE = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
    "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.5, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
OTHERS = {
    "longrope": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, max_position_embeddings=256, rope_parameters=LONGROPE)
    ),
    "dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=DYNAMIC)
    ),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_cases_do_not_mix(kind, tmp_path):
    """Angles that depend on the longest sequence of a batch; attention of the model's own."""
    torch.manual_seed(5)
    OTHERS[kind]().save_pretrained(tmp_path)
    model = HuggingFaceModel(str(tmp_path), "float32", "cpu")
    given = prompts(1, [10, 50, 70, 90])
    assert ours(model, given) == theirs(tmp_path, given)


def test_stop_tokens_are_the_models_own(model, small_hf):
    assert model.stop_tokens == (2,)
    model.module.generation_config.eos_token_id = [2, 9]
    assert hf_model._stop_tokens(model.module) == (2, 9)
    model.module.generation_config.eos_token_id = None
    assert hf_model._stop_tokens(model.module) == ()


def test_memory_that_pytorch_holds_is_free(monkeypatch):
    """Otherwise every task would be answered in smaller batches than the one before."""
    for name, value in {
        "mem_get_info": (50, 80),
        "memory_reserved": 30,
        "memory_allocated": 10,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert generation._free_on_gpu() == 70
