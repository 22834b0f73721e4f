# SPDX-License-Identifier: Apache-2.0
"""LongPPL is what its paper defines: a plain reference with transformers gives the same."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.arguments import arguments
from support.evaluation import VOCABULARY

from megatron_cream.corpus.storage import write_index
from megatron_cream.errors import UserError
from megatron_cream.evaluation import longppl as longppl_module
from megatron_cream.evaluation.evaluate import evaluate, format_results
from megatron_cream.evaluation.longppl import read_key_tokens
from megatron_cream.evaluation.pictures import picture
from megatron_cream.evaluation.result_files import read_result
from megatron_cream.evaluation.results_page import compare

LENGTHS, TOKENS, DOCUMENTS = (4608, 5600), 5600, 2


def write_sharp_model(folder, tokenizer, seed):
    """A random model that is often sure, and whose mind far tokens change."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": 8192, "initializer_range": 1.0},
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tokenizer}/{name}", folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(small_hf, tmp_path_factory):
    """Folders of a judge, of the judge of short contexts, and of a model to measure."""
    root = tmp_path_factory.mktemp("longppl")
    return [write_sharp_model(root / str(seed), small_hf, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """An indexed dataset of random documents, and their tokens."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, VOCABULARY - 7, (DOCUMENTS, TOKENS))
    prefix = str(tmp_path_factory.mktemp("data") / "held")
    found.astype(np.uint16).tofile(f"{prefix}.bin")
    sizes = np.full(DOCUMENTS, TOKENS, np.int32), np.ones(DOCUMENTS, np.int64)
    write_index(f"{prefix}.idx", np.dtype(np.uint16), [sizes], DOCUMENTS, DOCUMENTS)
    return prefix, list(found)


@cache
def load(folder):
    """A model as transformers has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def logprobs(folder, tokens):
    """Log-probability of each token but the first, by transformers."""
    ids = torch.tensor(tokens)[None]
    with torch.inference_mode():
        logits = load(folder)(ids).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return -losses.double().numpy()


def longppl(judge, judge_short, model, documents, length):
    """The paper's definition (2410.23771, sections 3.2 and 4.1), token by token."""
    nll, count = 0.0, 0
    for document in documents:
        text = document[:length]
        full, own = logprobs(judge, text), logprobs(model, text)
        start = 0
        while start + 4096 < length:
            short = logprobs(judge_short, text[start : start + 4096 + 1024])
            for place in range(start + 4096, min(start + 4096 + 1024, length)):
                gain = full[place - 1] - short[place - start - 1]
                if gain > 2 and full[place - 1] > -2:
                    nll -= own[place - 1]
                    count += 1
            start += 1024
    return math.exp(nll / count), count


@pytest.fixture(scope="module")
def judged(models, documents, tmp_path_factory):
    """A run that judges, its result, and the file of key tokens that it keeps."""
    judge, judge_short, model = models
    root = tmp_path_factory.mktemp("judged")
    settings = arguments(
        **asked_of(documents), hf=model, judge=judge, judge_short=judge_short, batch_tokens=12_000,
        save_key_tokens=str(root / "key.json"), output=str(root / "run"),
    )  # fmt: skip
    (result,) = evaluate(settings)
    return settings, result


def asked_of(documents):
    return {
        **{"tasks": ["longppl"], "data": documents[0], "documents": DOCUMENTS},
        "lengths": list(LENGTHS),
    }


def test_equals_the_definition(models, documents, judged):
    _, result = judged
    counts = []
    for row in result["lengths"]:
        wanted, count = longppl(*models, documents[1], row["length"])
        assert row["key_targets"] == count
        assert row["longppl"] == pytest.approx(wanted, rel=1e-4)
        plain = [-logprobs(models[2], one[: row["length"]]).mean() for one in documents[1]]
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(plain)), rel=1e-4)
        counts.append(count)
    assert 2 < counts[0] < counts[1]


def test_kept_key_tokens_measure_alike(models, documents, judged, tmp_path, monkeypatch):
    """A file of key tokens asks no judge, and names the judge that made it."""
    settings, result = judged
    monkeypatch.setattr(longppl_module, "judge_documents", None)
    output = str(tmp_path / "kept")
    key = settings.save_key_tokens
    asked = asked_of(documents) | {"lengths": LENGTHS[:1]}
    (found,) = evaluate(arguments(**asked, hf=models[2], key_tokens=key, output=output))
    assert found["lengths"] == result["lengths"][:1]
    assert found["key_tokens"] == result["key_tokens"]
    assert found["key_tokens"]["judge"] == models[0]
    assert read_result(output) == json.loads(json.dumps(found))
    # A killed run that judged goes on with the file that it kept.
    assert evaluate(settings) == [result]


def test_is_shown_beside_perplexity(judged, tmp_path):
    _, result = judged
    rows = format_results([result]).splitlines()
    assert [cell.strip() for cell in rows[2].split("|")[2:6]] == [
        *("LongPPL", "95 % interval", "perplexity", "95 % interval"),
    ]
    assert f"{result['lengths'][0]['longppl']:.3f}" in rows[4]
    left, right = picture([result]).axes
    assert left.lines[0].get_ydata() == pytest.approx([r["longppl"] for r in result["lengths"]])
    assert right.lines[0].get_ydata() == pytest.approx([r["perplexity"] for r in result["lengths"]])
    compare([judged[0].output] * 2, str(tmp_path / "both"))
    cell = f"{result['lengths'][1]['longppl']:.2f} ({result['lengths'][1]['perplexity']:.2f})"
    assert (tmp_path / "both" / "table.md").read_text().count(cell) == 2


def test_another_judge_or_other_documents_are_refused(models, documents, judged):
    settings, _ = judged
    key = settings.save_key_tokens
    asked = asked_of(documents) | {"hf": models[2]}
    with pytest.raises(UserError, match="--save-key-tokens is .*of another judge"):
        evaluate(arguments(**asked, judge=models[1], save_key_tokens=key))
    with pytest.raises(UserError, match="--documents and --document-tokens are 1 and"):
        evaluate(arguments(**asked | {"documents": 1}, key_tokens=key))
    changed = json.loads(Path(key).read_text()) | {"data_content": "0"}
    Path(key + ".changed").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="of other documents than those of --data"):
        evaluate(arguments(**asked, key_tokens=key + ".changed"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [4096], "judge": "x"}, "--lengths has 4096: LongPPL needs more than 4096"),
        ({}, "--judge or --key-tokens: exactly one"),
        ({"key_tokens": "x", "judge_short": "y"}, "--judge-short is y with --key-tokens"),
        ({"judge": "nowhere"}, "--judge is nowhere: it must be a folder"),
        ({"key_tokens": "nowhere"}, "--key-tokens is nowhere: it must be a file of --save-key"),
        ({"tasks": ["longppl", "needle"]}, "--tasks has longppl, needle: longppl must be"),
    ],
)
def test_flags_that_do_not_go_together(small_hf, changes, message):
    asked = {"tasks": ["longppl"], "hf": small_hf, "data": "books", "lengths": [8192]}
    with pytest.raises((UserError, FileNotFoundError), match=message):
        arguments(**asked | changes).validate()


def test_files_that_have_no_key_tokens(tmp_path, judged):
    path = tmp_path / "key.json"
    whole = json.loads(Path(judged[0].save_key_tokens).read_text())
    for wrong in ({}, whole | {"places": [[4095]]}, whole | {"places": [[4200, 4200]]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="it must be a file of --save-key-tokens"):
            read_key_tokens(path, "--key-tokens")
