# SPDX-License-Identifier: Apache-2.0
"""Means, groups and intervals of results, against definitions, published values, simulations."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_cream.evaluation.perplexity import perplexity_results
from megatron_cream.evaluation.prompts import validate_vocabulary
from megatron_cream.evaluation.results import effective_count, length_name, t_interval, wilson
from megatron_cream.evaluation.scoring import CaseScore, _record, case_results


def case(seed, haystack, index, hit, **changes):
    return {
        **{"length": 384, "seed": seed, "haystack": haystack, "index": index, "where": index / 2},
        **{"hit": bool(hit), "items": float(hit), "tokens": float(hit), "number": bool(hit)},
        **{"logprob": -1.0, "answer_tokens": 1, **changes},
    }


def document(number, nll, targets, length=512):
    return {"length": length, "document": number, "nll": nll, "targets": targets}


def test_perplexity_is_a_mean_over_targets_and_not_over_documents():
    long, short = document(0, [60.0, 40.0], [60, 40]), document(1, [30.0, 0.0], [10, 0])
    (row,) = perplexity_results([short, long])["lengths"]
    assert row["nll"] == pytest.approx(130 / 110)  # of documents it would be 2
    assert row["perplexity"] == pytest.approx(math.exp(130 / 110))
    assert (row["targets"], row["documents"]) == (110, 2)
    assert row["document_nll"] == [1.0, 3.0]  # in their order
    first, second = perplexity_results([short, long])["positions"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 256, 256, 512)
    assert first["perplexity"] == pytest.approx(math.exp(90 / 70))
    assert second["perplexity"] == pytest.approx(math.exp(40 / 40))
    assert (first["targets"], second["targets"]) == (70, 40)


def test_lengths_are_apart_and_in_order():
    found = perplexity_results([document(0, [8.0, 0.0], [4, 1]), document(0, [3.0], [3], 96)])
    assert [(row["length"], row["targets"]) for row in found["lengths"]] == [(96, 3), (512, 5)]
    assert [(p["length"], p["from"], p["to"]) for p in found["positions"]] == [
        (96, 0, 96), (512, 0, 256), (512, 256, 512),
    ]  # fmt: skip


@pytest.mark.parametrize("nll", [1e6, math.inf, math.nan])
def test_what_a_broken_model_makes_is_a_number_all_the_same(nll):
    (row,) = perplexity_results([document(i, [nll + i, 1.0], [1, 1]) for i in range(3)])["lengths"]
    assert math.isnan(row["perplexity"]) if math.isnan(nll) else row["perplexity"] == math.inf


def test_haystacks_of_two_seeds_are_two():
    """Each seed numbers its haystacks from 0; their cases fail together, but not with another's."""
    cases = [case(seed, 0, i, seed % 2) for seed in range(8) for i in range(3)]
    (row,) = case_results(cases, 3, number=False, placed=False)["lengths"]
    assert row["haystacks"] == 8 and row["cases"] == 24
    groups = [(c["seed"], 0) for c in cases]
    independent = effective_count([c["hit"] for c in cases], groups)
    assert independent == 8
    assert row["independent_cases"] == 8
    assert (row["hit_low"], row["hit_high"]) == wilson(0.5, 8)  # not of 24 cases


def test_shares_are_means_over_cases():
    cases = [
        case(0, 0, 0, 1, logprob=-1.0, answer_tokens=1),
        case(0, 0, 1, 0, logprob=-5.0, answer_tokens=3, items=0.5, tokens=0.25, number=True),
    ]
    (row,) = case_results(cases, 3, number=True, placed=False)["lengths"]
    assert (row["hit"], row["items"], row["tokens"], row["number"]) == (0.5, 0.75, 0.625, 1.0)
    assert row["logprob"] == -3.0
    assert row["logprob_per_token"] == -6.0 / 4


def test_places_are_rounded_to_those_that_were_asked_for():
    cases = [case(0, 0, i, i, where=where) for i, where in enumerate((0.0, 0.49, 1.0))]
    found = case_results(cases + [case(1, 0, 0, 0, where=0.52)], 3, False, True)["places"]
    assert [(row["where"], row["cases"]) for row in found] == [(0.0, 1), (0.5, 2), (1.0, 1)]
    assert case_results(cases, 1, False, True)["places"][0]["where"] == 0.0


def test_a_star_is_for_what_is_longer_than_the_window():
    result = {"window": 512}
    assert [length_name(result, n) for n in (511, 512, 513)] == ["511", "512", "513\\*"]


def test_a_first_integer_is_right_where_the_answer_is_and_no_digit_follows():
    class Digits:
        tokenizer = type("T", (), {"decode": staticmethod(lambda ids: "7" if ids[0] else " 7")})

    score = CaseScore(384, 0, 0, 0, 0.5, True, 1.0, 1.0, -0.1, 2, 0)
    numbers = [
        _record(dataclasses.replace(score, hit=hit, next=behind), "passkey", Digits)["number"]
        for hit in (True, False)
        for behind in (0, 1)
    ]
    assert numbers == [True, False, False, False]
    assert "number" not in _record(score, "needle", Digits)


@pytest.mark.parametrize(
    ("tokens", "fits"), [(32000, True), (32001, False), (27776, True), (27775, False)]
)
def test_a_tokenizer_may_lack_a_tenth_and_a_thousand_tokens(tokens, fits):
    tokenizer = type("T", (), {"vocab_size": tokens})
    model = type("M", (), {"vocabulary": 32000, "name": "m"})
    if fits:
        validate_vocabulary(tokenizer, model)
    else:
        with pytest.raises(ValueError, match=f"has {tokens} tokens, m has 32000"):
            validate_vocabulary(tokenizer, model)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)],
)
def test_wilson(share, count, low, high):
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_student():
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(t_interval([1.0])[0])


def test_cases_that_fail_together_count_once():
    groups = np.repeat(range(20), 5)
    together = np.repeat(np.arange(20) % 2, 5)
    assert effective_count(together, groups) == pytest.approx(20, abs=2)
    apart = np.tile([0, 1, 1, 0, 1], 20)
    assert effective_count(apart, groups) == 100
    assert effective_count([1] * 10, range(10)) == 10


def test_interval_of_shared_haystacks_covers():
    """Of shares simulated with whole haystacks as units, about 95 % lie in the interval."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        chances = rng.choice([0.1, 0.9], size=30)  # a haystack is easy or hard
        hits = rng.random((30, 5)) < chances[:, None]
        count = effective_count(hits.ravel(), np.repeat(range(30), 5))
        low, high = wilson(hits.mean(), count)
        inside += low <= 0.5 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_effective_count_is_the_design_effect_of_few_groups():
    """Kish's effect with n / (n - 1): of two groups the factor is 2, and nothing else says so."""
    values, groups = [1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]
    mean, count = 0.5, 8
    sums = [3 - 4 * mean, 1 - 4 * mean]
    clustered = sum(s * s for s in sums) / count**2 * 2 / (2 - 1)
    effect = clustered / (0.25 / count)
    assert effect == 2  # without the factor it would be 1, and all 8 cases would count
    assert effective_count(values, groups) == pytest.approx(count / effect)


@pytest.mark.parametrize(
    ("count", "t"), [(2, 12.706), (3, 4.303), (16, 2.131), (31, 2.042), (41, 2.021), (121, 1.980)]
)
def test_student_by_degrees_of_freedom(count, t):
    values = [float(i % 2) for i in range(count)]
    low, high = t_interval(values)
    deviation = float(np.std(values, ddof=1))
    assert (high - low) / 2 == pytest.approx(t * deviation / math.sqrt(count), rel=1e-3)
