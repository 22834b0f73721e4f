# SPDX-License-Identifier: Apache-2.0
"""Conversations to documents: two formats, one text, the ids that transformers gives."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import exit_status

from megatron_cream.corpus.chat import messages_of
from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.data.indexed import read_index

TEMPLATE = (
    "{% for m in messages %}{% if loop.index0 % 2 == 0 and m.role == 'assistant' %}"
    "{{ raise_exception('the user must speak first') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TALK = [("user", "What is a whale?"), ("assistant", "A mammal."), ("user", "And a shark?")]
MESSAGES = {"messages": [{"role": who, "content": what} for who, what in TALK]}
SHAREGPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[who], "value": what} for who, what in TALK
    ]
}


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "render_chat.py"
    spec = importlib.util.spec_from_file_location("render_chat", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["What is a whale? A mammal. And a shark? A fish. [INST] [/INST]"] * 3, 300, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
    return str(path)


def test_a_dataset_has_the_ids_that_transformers_gives(tool, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    source = write(tmp_path / "in.jsonl", MESSAGES, SHAREGPT)
    rendered = str(tmp_path / "out.jsonl")
    assert (
        tool.main([f"--input={source}", f"--output={rendered}", f"--tokenizer-model={tokenizer}"])
        == 0
    )
    preprocess(
        PreprocessConfig(
            input=(rendered,),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer),
            output_prefix=str(tmp_path / "data"),
        )
    )
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    encoded = theirs.apply_chat_template(MESSAGES["messages"], return_dict=True)["input_ids"]
    assert theirs.eos_token_id in encoded, "a special token, not its letters"
    index = read_index(str(tmp_path / "data"))
    assert index.lengths.tolist() == [len(encoded)] * 2, "both formats are the same document"
    ids = np.fromfile(tmp_path / "data.bin", index.dtype)
    assert ids.tolist() == [*encoded, *encoded]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "no"}, "it must have a list, messages or conversations"),
        ({"messages": []}, "its list of messages is empty"),
        ({"messages": [{"role": "user"}]}, "each message must have a text, content"),
        ({"conversations": [{"from": "dog", "value": "wow"}]}, "from of a message is 'dog'"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "the user must speak first"),
    ],
)
def test_a_bad_conversation_names_its_line_or_is_skipped(
    tool, tokenizer, record, said, tmp_path, capsys
):
    source = write(tmp_path / "in.jsonl", MESSAGES, record)
    output = tmp_path / "out.jsonl"
    flags = ["--input", source, "--output", str(output), "--tokenizer-model", str(tokenizer)]
    assert exit_status(tool.main, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}, line 2: ") and said in error
    assert list(tmp_path.iterdir()) == [Path(source)], "nothing half-written"
    assert tool.main([*flags, "--on-error", "skip"]) == 0
    assert capsys.readouterr().out == f"{output}: 1 conversations, 1 skipped\n"
    assert len(output.read_text().splitlines()) == 1


def test_a_tokenizer_without_template_is_refused(tool, tmp_path, capsys):
    train_bpe(["text"], 257, tmp_path / "plain")
    source = write(tmp_path / "in.jsonl", MESSAGES)
    out = str(tmp_path / "out.jsonl")
    flags = ["--input", source, "--output", out, "--tokenizer-model", str(tmp_path / "plain")]
    assert exit_status(tool.main, flags) == 2
    assert "it must have a chat template" in capsys.readouterr().err


def test_roles_of_both_formats():
    assert messages_of(SHAREGPT) == messages_of(MESSAGES) == MESSAGES["messages"]
