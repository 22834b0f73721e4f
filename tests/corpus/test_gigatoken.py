# SPDX-License-Identifier: Apache-2.0
"""The fast tokenizer against the reference libraries, and cutting long texts."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from megatron_cream.corpus import fast_encoder as module
from megatron_cream.corpus.fast_encoder import (
    GigatokenTokenizer,
    GigatokenUnsupported,
    choose_engine,
    encode_pieces,
    find_text_splitter,
)
from megatron_cream.corpus.job import plan_job
from megatron_cream.corpus.preprocess import sample_texts
from megatron_cream.corpus.tokenizers import load_tokenizer, train_bpe

pytest.importorskip("gigatoken")

WORDS = (
    "the cat sat on the mat and the hat was on the cat 1234 it's don't\n\n  x = f(y);\tκόσμε "
    "中文文本。日本語 🎈 Ünïcode"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.lists(
    st.sampled_from(
        ["the", "cat", " ", "  ", "\n", "\n\n", "\t", "1234", ".", "'s", "κόσμε", "中文", "🎈"]
        + ["<|endoftext|>", "\u2581", "é", "e\u0301", "\u00a0", "\r\n", "\x04", "\U00040001", "Q"]
    ),
    max_size=60,
).map("".join)


def llama3(folder):
    """The same vocabulary with another way to split text, and some bytes taken away."""
    description = json.loads((folder / "tokenizer.json").read_text())
    model = Tokenizer.from_str(json.dumps(description))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    description = json.loads(model.to_str())
    gone = {letter for byte, letter in module._byte_letters().items() if byte in (4, 0xF1, 0xFF)}
    vocab = description["model"]["vocab"]
    description["model"]["vocab"] = {k: v for k, v in vocab.items() if k not in gone}
    return description


def sentencepiece_bpe(prefix, **options):
    """A model of the kind of Llama-2's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS.replace("\n", " ")] * 50),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return load_tokenizer("SentencePieceTokenizer", prefix.with_suffix(".model"))


@pytest.fixture(scope="session", params=["gpt2", "llama3 without some bytes", "sentencepiece"])
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return sentencepiece_bpe(folder / "tiny")
    train_bpe([WORDS] * 20, 400, folder)
    if request.param != "gpt2":
        (folder / "tokenizer.json").write_text(json.dumps(llama3(folder)))
    return load_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="session")
def tokenizer(reference):
    return GigatokenTokenizer(reference)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_ids_are_those_of_the_reference(reference, tokenizer, text):
    assert tokenizer.encode([text])[0].tolist() == reference.encode([text])[0].tolist()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_any_characters(reference, tokenizer, text):
    assert tokenizer.encode([text])[0].tolist() == reference.encode([text])[0].tolist()


def test_hard_texts_hold_every_special_token(reference, tokenizer):
    texts = module.hard_texts(reference)
    assert tokenizer.first_difference(texts) is None
    assert any("<unk>" in text for text in texts)
    if reference.name == "HuggingFaceTokenizer":
        assert any(reference.eod in reference.encode([text])[0] for text in texts)


def test_characters_of_missing_bytes_are_repaired_in_long_text(reference, tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        letters = list(WORDS * rng.randrange(1, 80))
        for _ in range(rng.randrange(1, 6)):
            letters.insert(rng.randrange(len(letters)), rng.choice("\x04\U00040001"))
        text = "".join(letters)
        assert tokenizer.encode([text])[0].tolist() == reference.encode([text])[0].tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=8), st.integers(8, 90), st.randoms())
def test_texts_in_pieces_give_the_ids_of_the_whole(reference, tokenizer, texts, size, rng):
    text = "".join(texts)
    pieces, at = [], 0
    while at < len(text):
        pieces.append(text[at : at + rng.randrange(1, 40)])
        at += len(pieces[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CUT_CHARACTERS", size)
        patch.setattr(module, "_CONTEXT", 4)
        for each in (reference, tokenizer):
            rows = list(encode_pieces(each, find_text_splitter(reference), pieces))
            assert np.concatenate(rows).tolist() == reference.encode([text])[0].tolist()


def test_long_texts_are_cut(reference, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CUT_CHARACTERS", 2000)
    calls = []
    monkeypatch.setattr(type(reference), "encode", _counting(type(reference).encode, calls))
    text = WORDS * 200
    ids = module.encode_texts(reference, [text], lambda: find_text_splitter(reference))[0]
    assert len(calls) >= 10 and max(calls) < 4000
    assert ids.tolist() == tokenizer.encode([text])[0].tolist()


def _counting(encode, calls):
    def counted(self, texts):
        calls.extend(map(len, texts))
        return encode(self, texts)

    return counted


@pytest.mark.parametrize(
    "token",
    [{"content": "a\nb"}, {"content": "x y"}, {"content": "<m>", "lstrip": True}],
)
def test_added_tokens_that_reach_across_cuts_forbid_them(tmp_path, token):
    train_bpe([WORDS], 300, tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {**description["added_tokens"][0], "id": 300, "special": False, **token}
    description["added_tokens"].append(added)
    description["model"]["vocab"][token["content"]] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert find_text_splitter(load_tokenizer("HuggingFaceTokenizer", tmp_path)) is None


def test_cache_is_bounded(reference, monkeypatch):
    tokenizer = GigatokenTokenizer(reference)
    monkeypatch.setattr(module, "_CHECK_CHARACTERS", 10)
    resident = iter([10**13, 10**13, 0, 0, 0, 0])
    monkeypatch.setattr(module, "_resident_bytes", lambda: next(resident))
    before = tokenizer._backend
    tokenizer.encode([WORDS])
    assert tokenizer._backend is not before
    again = tokenizer._backend
    assert tokenizer.encode([WORDS])[0].tolist() == reference.encode([WORDS])[0].tolist()
    assert tokenizer._backend is again


def test_engine_is_chosen_and_said(reference):
    chosen, line = choose_engine("auto", reference, [WORDS])
    assert isinstance(chosen, GigatokenTokenizer)
    assert line.startswith("tokenizing with gigatoken, compared with ")
    chosen, line = choose_engine("reference", reference, [WORDS])
    assert chosen is reference and line.startswith("tokenizing with ")


def test_any_difference_refuses_the_fast_engine(reference, monkeypatch):
    true_encode = GigatokenTokenizer.encode
    wrong = "some text of the job"

    def encode(self, texts):
        rows = true_encode(self, texts)
        return [row[::-1] if wrong in text else row for row, text in zip(rows, texts, strict=True)]

    monkeypatch.setattr(GigatokenTokenizer, "encode", encode)
    chosen, line = choose_engine("auto", reference, [wrong])
    assert chosen is reference
    assert "gigatoken gives other ids, token 0 is [" in line
    with pytest.raises(ValueError, match="--engine fast: gigatoken gives other ids, token 0"):
        choose_engine("fast", reference, [wrong])
    fast = GigatokenTokenizer(reference)
    fast.verify(["fine"], fast.encode(["fine"]))
    with pytest.raises(ValueError, match="differs from the reference tokenizer: token 0"):
        fast.verify([wrong], fast.encode([wrong]))


def test_every_text_is_compared_on_request(reference):
    fast = GigatokenTokenizer(reference, verify_all=True)
    assert fast.encode([WORDS])[0].tolist() == reference.encode([WORDS])[0].tolist()
    fast.reference = load_tokenizer("ByteLevelTokenizer")
    with pytest.raises(ValueError, match="differs from the reference tokenizer: token 0"):
        fast.encode([WORDS])


def test_a_real_difference_is_found(tmp_path):
    """gigatoken puts no mark before a user-defined piece that begins a text; the library does."""
    model = sentencepiece_bpe(tmp_path / "tiny", user_defined_symbols=["<mask>"])
    chosen, line = choose_engine("auto", model, [])
    assert (
        not isinstance(chosen, GigatokenTokenizer)
        and "gigatoken gives other ids" in line
        and "<mask>" in line
    )


def test_tokenizers_that_gigatoken_does_not_take(tmp_path, monkeypatch):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS.replace("\n", " ")] * 20),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    unigram = load_tokenizer("SentencePieceTokenizer", tmp_path / "unigram.model")
    chosen, line = choose_engine("auto", unigram, [])
    assert (
        not isinstance(chosen, GigatokenTokenizer)
        and "tokenizing with sentencepiece: gigatoken does not take" in line
    )
    with pytest.raises(ValueError, match="--engine fast: gigatoken does not take this model"):
        choose_engine("fast", unigram, [])
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(GigatokenUnsupported, match="gigatoken is not installed"):
        GigatokenTokenizer(unigram)


def test_verifying_reads_the_first_documents(job, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nbroken\n{"text": "two"}\n{"text": "three"}\n')
    planned, *_ = plan_job(replace(job, input=(str(path), str(path))))
    assert list(sample_texts(planned, 2)) == ["one", "two"]
    assert list(sample_texts(planned, 4)) == ["one", "two", "three", "one"]
    assert list(sample_texts(planned, 0)) == []


def test_importing_the_package_needs_no_gigatoken():
    code = "import sys; sys.modules['gigatoken'] = None; import megatron_cream.corpus.preprocess"
    subprocess.run([sys.executable, "-c", code], check=True)
