# SPDX-License-Identifier: Apache-2.0
"""One pass scores a case as generation does, and tails as if each were alone."""

import dataclasses
import os

import numpy as np
import pytest
import torch

from megatron_cream.corpus.tokenizers import load_tokenizer
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.forward import ForwardPass, score_rows
from megatron_cream.evaluation.generation import generate_tokens
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.prompts import CaseTail, HaystackBuilder, HaystackCases, Prompt
from megatron_cream.evaluation.scoring import make_batches, make_pass, read_scores


@pytest.fixture(scope="module")
def model(small_hf):
    return HuggingFaceModel(small_hf, "float32", "cpu")


def random_haystack(length=60, tails=3, seed=0, vocabulary=384):
    rng = np.random.default_rng(seed)
    context = rng.integers(vocabulary, size=length - 12)
    made = [CaseTail(rng.integers(vocabulary, size=12), (2, 3), 0.5) for _ in range(tails)]
    return HaystackCases(context, made, length, seed)


def scores(model, haystacks, share=True, batch_tokens=4096):
    found = []
    every = list(make_batches(haystacks, batch_tokens, share))
    for batch, answer in zip(every, model.run(map(make_pass, every)), strict=True):
        found += read_scores(batch, answer)
    return sorted(found, key=lambda s: (s.seed, s.index)), every


def greedy(model, haystack, index):
    """What transformers generates for a case, as many tokens as the gold answer has."""
    tail = haystack.tails[index]
    whole = np.concatenate([haystack.context, tail.tokens])
    size = len(tail.answer)
    return generate_tokens(model.module, whole[: len(whole) - size], size)


def with_greedy_answers(model, haystack, chosen):
    """The haystack with the gold answers of ``chosen`` replaced by what the model writes."""
    tails = list(haystack.tails)
    for index in chosen:
        tail = tails[index]
        tokens = tail.tokens.copy()
        tokens[len(tokens) - len(tail.answer) :] = greedy(model, haystack, index)
        tails[index] = dataclasses.replace(tail, tokens=tokens)
    return dataclasses.replace(haystack, tails=tails)


def test_a_hit_is_what_generate_writes(model):
    stock = model.module.config._attn_implementation
    made = [random_haystack(seed=seed) for seed in range(6)]
    model.module.set_attn_implementation("sdpa")
    made = [with_greedy_answers(model, haystack, [0, 2]) for haystack in made]
    wrote = [[greedy(model, h, i) for i in range(3)] for h in made]
    model.module.set_attn_implementation(stock)
    found, every = scores(model, made)
    assert len(every) == 1
    for case in found:
        gold = made[case.seed].tails[case.index].answer
        assert case.hit == np.array_equal(wrote[case.seed][case.index], gold)
    assert {case.hit for case in found} == {True, False}
    assert all(case.hit == (case.index != 1) for case in found)


def test_tails_do_not_see_each_other(model):
    made = [random_haystack(seed=seed) for seed in range(2)]
    together, one_pass = scores(model, made)
    alone, passes = scores(model, made, share=False)
    assert len(one_pass) == 1 and len(passes) == 3
    for left, right in zip(together, alone, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=2e-4)
        assert left.next == right.next and left.tokens == right.tokens


def test_log_likelihood_is_that_of_the_logits(model):
    haystack = random_haystack(tails=1)
    (case,), _ = scores(model, [haystack])
    whole = np.concatenate([haystack.context, haystack.tails[0].tokens])
    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(whole)[None]).logits[0].double()
    model.module.set_attn_implementation("megatron_cream")
    logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(whole[1:])[:, None])[:, 0]
    assert case.logprob == pytest.approx(logprobs[-5:].sum().item(), abs=1e-4)
    assert case.next == logits[-1].argmax().item()


def test_parts_of_an_answer():
    from megatron_cream.evaluation.scoring import _score

    tail = CaseTail(np.arange(10, 20), (2, 3), 0.25)
    haystack = HaystackCases(np.arange(5), [tail], 15, 0)
    best = np.array([99, 15, 16, 17, 0, 19, 7])  # longer answers of other tails come first
    case = _score(haystack, 0, tail, np.full(7, -0.5), best)
    assert (case.hit, case.items, case.tokens) == (False, 0.5, 0.8)
    assert (case.logprob, case.answer_tokens, case.next) == (-2.5, 5, 7)


@pytest.mark.parametrize("vocabulary", [40, 37, 19])
def test_padding_rows_are_left_out(vocabulary):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 8, generator=generator)
    weight[vocabulary:] = 50  # padding that would win every arg-max
    hidden = torch.randn(11, 8, generator=generator).abs()
    targets = torch.randint(vocabulary, (11,), generator=generator)
    logprobs, best = score_rows(hidden, lambda rows: rows @ weight.T, targets, vocabulary)
    logits = (hidden @ weight[:vocabulary].T).double()
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=0)
    assert torch.equal(best, logits.argmax(-1))


def test_positions_of_tails():
    one = ForwardPass(
        torch.zeros(2, 10, dtype=torch.int64), torch.tensor([9]), torch.zeros(2, 1), 2, 3
    )
    assert one.context == 4
    assert one.positions()[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]


@pytest.mark.skipif(
    "MEGATRON_CREAM_SMALL_HF" not in os.environ,
    reason="MEGATRON_CREAM_SMALL_HF must name a Hugging Face folder of a small trained model",
)
def test_a_hit_is_what_generate_writes_on_a_trained_model():
    folder = os.environ["MEGATRON_CREAM_SMALL_HF"]
    trained = HuggingFaceModel(folder, "float32", "cpu")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder)
    kit = HaystackBuilder(Prompt(tokenizer, "base", None, folder), [])
    made = []
    for task, length in (("passkey", 256), ("longchat-lines", 384), ("kv-retrieval", 640)):
        made += kit.make(TASKS[task], length, 0, 3)
    made = [dataclasses.replace(one, seed=i) for i, one in enumerate(made)]
    found, _ = scores(trained, made)
    trained.module.set_attn_implementation("sdpa")
    for case in found:
        gold = made[case.seed].tails[case.index].answer
        assert case.hit == np.array_equal(greedy(trained, made[case.seed], case.index), gold)
    assert {case.hit for case in found} == {True, False}
