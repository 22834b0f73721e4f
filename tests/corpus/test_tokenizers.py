# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_cream.corpus.tokenizers import load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat\n", "κόσμε 🎈 \tthe\r\n", "", "the<|endoftext|>cat"]
CORPUS = ["the cat sat on the mat and the hat was on the cat"] * 20


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe") / "made" / "here"
    train_bpe(CORPUS, 280, folder)
    return folder


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("sp") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def sp_bytes(tmp_path_factory):
    """A model of the kind of Llama-2's: every character has tokens."""
    prefix = tmp_path_factory.mktemp("sp-bytes") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer("SentencePieceTokenizer", prefix.with_suffix(".model"))


def copied(folder, tmp_path, config, change=lambda content: None):
    """A copy of the tokenizer with other settings; `config` of None writes no config file."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_byte_level_ids_are_the_bytes():
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (257, 256, None)
    rows = tokenizer.encode(TEXTS)
    assert [bytes(row.tolist()) for row in rows] == [text.encode() for text in TEXTS]
    assert all(row.dtype == np.int32 for row in rows)
    assert [tokenizer.decode(row) for row in rows] == TEXTS
    assert tokenizer.decode([104, 256, 0xCE]) == "h\ufffd"
    with pytest.raises(ValueError, match="needs 0 to 256"):
        tokenizer.decode([257])


def test_hugging_face_ids_equal_the_library(bpe_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe_folder)
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    rows = tokenizer.encode(TEXTS)
    assert [row.tolist() for row in rows] == [library.encode(text).ids for text in TEXTS]
    assert all(row.dtype == np.int32 and row.ndim == 1 for row in rows)
    assert [tokenizer.decode(row) for row in rows] == TEXTS
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_special_token_in_the_text_is_one_id(bpe_folder):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe_folder / "tokenizer.json")
    assert tokenizer.encode(["<|endoftext|>"])[0].tolist() == [tokenizer.eod]


def test_no_special_tokens_truncation_or_padding(bpe_folder, tmp_path):
    def change(content):
        model = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        model.enable_truncation(3)
        model.enable_padding(length=64)
        content.update(json.loads(model.to_str()))

    plain = load_tokenizer("HuggingFaceTokenizer", bpe_folder).encode(TEXTS)
    changed = load_tokenizer("HuggingFaceTokenizer", copied(bpe_folder, tmp_path, None, change))
    assert [row.tolist() for row in changed.encode(TEXTS)] == [row.tolist() for row in plain]


@pytest.mark.parametrize("token", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eos_and_bos_in_every_spelling(bpe_folder, tmp_path, token, name):
    copied(bpe_folder, tmp_path, {"eos_token": None})
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path).eod is None
    (tmp_path / name).write_text(json.dumps({"eos_token": token, "bos_token": "a"}))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert tokenizer.eod == 0
    assert tokenizer.decode([tokenizer.bos]) == "a"


def test_eos_outside_the_vocabulary_is_an_error(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, {"eos_token": "</nowhere>"})
    with pytest.raises(ValueError, match="tokenizer_config.json has eos_token '</nowhere>', needs"):
        load_tokenizer("HuggingFaceTokenizer", folder)


def test_vocab_size_covers_ids_with_gaps(bpe_folder, tmp_path):
    def change(content):
        content["model"]["vocab"]["zzz"] = 70_000

    folder = copied(bpe_folder, tmp_path, None, change)
    assert load_tokenizer("HuggingFaceTokenizer", folder).vocab_size == 70_001


def test_train_bpe_writes_a_folder_that_loads_the_same(bpe_folder, tmp_path):
    tokenizer = train_bpe(iter(CORPUS), 280, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        bpe_folder / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    assert 257 < tokenizer.vocab_size <= 280
    assert len(tokenizer.encode(["the cat"])[0]) < len("the cat")
    with pytest.raises(ValueError, match="vocab_size 256: needs 257"):
        train_bpe(CORPUS, 256, tmp_path)


def test_sentencepiece_ids_equal_the_library(sp_model):
    tokenizer = load_tokenizer("SentencePieceTokenizer", sp_model)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    rows = tokenizer.encode(CORPUS[:2] + ["", "cat"])
    assert [row.tolist() for row in rows] == library.encode(CORPUS[:2] + ["", "cat"])
    assert all(row.dtype == np.int32 for row in rows)
    assert tokenizer.decode(rows[0]) == CORPUS[0]
    assert (tokenizer.eod, tokenizer.bos) == (library.eos_id(), library.bos_id()) == (2, 1)
    assert tokenizer.vocab_size == library.get_piece_size()


def test_sentencepiece_without_bos_and_eos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "bare"),
        vocab_size=40,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = load_tokenizer("SentencePieceTokenizer", tmp_path / "bare.model")
    assert (tokenizer.eod, tokenizer.bos) == (None, None)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_models_that_are_missing_or_broken(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"--tokenizer-model \(not given\): {kind} needs"):
        load_tokenizer(kind)
    with pytest.raises(FileNotFoundError, match="--tokenizer-model .*gone: not found, needs a"):
        load_tokenizer(kind, tmp_path / "gone")
    (tmp_path / "bad").write_bytes(b"junk")
    with pytest.raises(ValueError, match="--tokenizer-model .*bad: not readable, needs a"):
        load_tokenizer(kind, tmp_path / "bad")


def test_wrong_type_and_unwanted_model():
    with pytest.raises(ValueError, match="--tokenizer-type Gpt: needs one of Hugging"):
        load_tokenizer("Gpt")
    with pytest.raises(ValueError, match="--tokenizer-model x: ByteLevelTokenizer needs it left"):
        load_tokenizer("ByteLevelTokenizer", "x")


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "bytes"])
def test_tokens_are_located_in_their_text(kind, bpe_folder, sp_bytes):
    tokenizer = {
        "bpe": lambda: load_tokenizer("HuggingFaceTokenizer", bpe_folder),
        "sentencepiece": lambda: sp_bytes,
        "bytes": lambda: load_tokenizer("ByteLevelTokenizer"),
    }[kind]()
    rng = np.random.default_rng(2)
    for _ in range(60):
        text = "".join(rng.choice(list("the cat  é🎈κ\n\n.9"), size=40))
        found = tokenizer.locate(text)
        assert found.ids.tolist() == tokenizer.encode([text])[0].tolist()
        spans = list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))
        assert {at for a, b in spans for at in range(a, b)} >= set(range(len(text)))
        assert all(a < b for a, b in spans) and spans == sorted(spans)
        for token, (a, b) in zip(found.ids, spans, strict=True):
            decoded = tokenizer.decode([token])
            if decoded and "\ufffd" not in decoded:  # whole characters
                assert decoded.strip(" ") == text[a:b].strip(" ")
        borders = np.sort(rng.choice(len(text), size=6, replace=False)).reshape(3, 2).tolist()
        inside = {at for a, b in borders for at in range(a, b)}
        expected = [bool(inside & set(range(a, b))) for a, b in spans]
        assert found.overlapping(borders).tolist() == expected
        assert not found.overlapping([]).any()
