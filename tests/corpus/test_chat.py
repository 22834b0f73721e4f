# SPDX-License-Identifier: Apache-2.0
"""Conversations to documents: two formats, one text, the ids that transformers gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import exit_status, load_file

from megatron_cream import ownership
from megatron_cream.corpus.chat import messages_of
from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.data.indexed import read_index, read_metadata
from megatron_cream.errors import UserError

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
    return load_file(path)


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


def test_what_a_killed_process_left_is_removed_and_nothing_of_the_users(tool, tokenizer, tmp_path):
    source, output = write(tmp_path / "in.jsonl", MESSAGES), tmp_path / "out.jsonl"
    flags = ["--input", source, "--output", str(output), "--tokenizer-model", str(tokenizer)]
    left = tmp_path / "out.jsonl.parts"
    left.mkdir()
    (left / "text").write_text("the user's")
    assert exit_status(tool.main, flags) == 2
    assert (left / "text").read_text() == "the user's" and not output.exists()
    ownership.mark(left, "conversations")
    assert tool.main(flags) == 0
    assert output.exists() and not left.exists()


def test_a_tokenizer_without_template_is_refused(tool, tmp_path, capsys):
    train_bpe(["text"], 257, tmp_path / "plain")
    source = write(tmp_path / "in.jsonl", MESSAGES)
    out = str(tmp_path / "out.jsonl")
    flags = ["--input", source, "--output", out, "--tokenizer-model", str(tmp_path / "plain")]
    assert exit_status(tool.main, flags) == 2
    assert "it must have a chat template" in capsys.readouterr().err


def test_roles_of_both_formats():
    assert messages_of(SHAREGPT) == messages_of(MESSAGES) == MESSAGES["messages"]


PAIRS = [*TALK, ("assistant", "A fish [INST] é."), ("user", "Why?"), ("assistant", " It swims. ")]
LONGER = {"messages": [{"role": who, "content": what} for who, what in PAIRS]}
MARKED = TEMPLATE.replace(
    " {{ m.content }}{{ eos_token }}",
    "{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}",
)


def with_template(tokenizer, folder, template):
    folder.mkdir()
    for path in Path(tokenizer).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def render(tool, source, folder, output):
    flags = ["--input", source, "--output", str(output), "--tokenizer-model", str(folder)]
    return exit_status(tool.main, [*flags, "--assistant-only"])


@pytest.fixture
def masked_job(tool, tokenizer, tmp_path):
    """Preprocessing of two conversations of which the assistant's words are trained."""
    source = write(tmp_path / "in.jsonl", LONGER, MESSAGES)
    assert not render(tool, source, tokenizer, tmp_path / "out.jsonl")
    return PreprocessConfig(
        input=(str(tmp_path / "out.jsonl"),),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer),
        mask_key="trained",
        output_prefix=str(tmp_path / "data"),
    )


def mask_of(job):
    return np.fromfile(job.output_prefix + ".mask", np.uint8).tolist()


def test_the_mask_is_that_of_transformers_for_a_template_with_marks(
    masked_job, tokenizer, tmp_path
):
    """The template that was rendered has none; its twin says what is the assistant's."""
    from transformers import AutoTokenizer

    preprocess(masked_job, progress=False)
    theirs = AutoTokenizer.from_pretrained(with_template(tokenizer, tmp_path / "marks", MARKED))
    ids, mask = [], []
    for messages in (LONGER["messages"], MESSAGES["messages"]):
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += found["input_ids"]
        mask += found["assistant_masks"]
    index = read_index(masked_job.output_prefix)
    assert np.fromfile(tmp_path / "data.bin", index.dtype).tolist() == ids
    assert mask_of(masked_job) == mask and 0 < sum(mask) < len(mask)
    note = read_metadata(masked_job.output_prefix)
    assert (note["mask_bytes"], note["trained_tokens"]) == (len(mask), sum(mask))


def test_a_mask_is_carried_through_limits_duplicates_and_parts(masked_job):
    preprocess(masked_job, progress=False)
    plain = mask_of(masked_job)
    first = int(read_index(masked_job.output_prefix).lengths[0])
    around = replace(masked_job, append_eod=True, overwrite=True)
    preprocess(around, progress=False)
    assert mask_of(masked_job) == [*plain[:first], 0, *plain[first:], 0]
    source = Path(masked_job.input[0])
    source.write_text(source.read_text() * 3)
    some = replace(masked_job, drop_duplicates=True, max_tokens=7, part_bytes=100, overwrite=True)
    preprocess(some, progress=False)
    assert mask_of(masked_job) == plain
    assert preprocess(replace(some, overwrite=False), progress=False).finished_before
    Path(masked_job.output_prefix + ".mask").unlink()
    with pytest.raises(UserError, match="exists"):
        preprocess(replace(some, overwrite=False), progress=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # What was said before is shortened once more is said, as templates do that drop thoughts.
        (TEMPLATE.replace("m.content }}{{", "m.content if loop.last else 'x' }}{{"), "message 2"),
        (TEMPLATE.replace("{% else %}", "{% else %}Assistant:"), "in front of message 2"),
        (TEMPLATE + "{{ messages|length }}", "changes what stands before it"),
    ],
)
def test_a_template_that_cannot_be_exact_is_refused(
    tool, tokenizer, template, said, tmp_path, capsys
):
    folder = with_template(tokenizer, tmp_path / "other", template)
    source = write(tmp_path / "in.jsonl", LONGER)
    assert render(tool, source, folder, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "--assistant-only: the chat template does not say exactly where" in error
    assert said in error and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "trained", [None, 3, [[0, 5], [4, 6]], [[2, 2]], [[0, 99]], [[0]], [[0.0, 1]], [[True, 2]]]
)
def test_stretches_that_are_none_are_a_bad_record(trained, tmp_path):
    source = write(tmp_path / "in.jsonl", {"text": "whales", "trained": trained})
    job = PreprocessConfig(
        input=(source,),
        tokenizer_type="ByteLevelTokenizer",
        mask_key="trained",
        output_prefix=str(tmp_path / "data"),
    )
    with pytest.raises(UserError, match=r"line 1: --mask-key trained: needs pairs \[first, end\]"):
        preprocess(job, progress=False)


def test_what_goes_with_no_mask_key(tmp_path):
    job = PreprocessConfig(
        input=(str(tmp_path / "a.txt"),),
        tokenizer_type="ByteLevelTokenizer",
        mask_key="trained",
        output_prefix=str(tmp_path / "data"),
    )
    Path(job.input[0]).write_text("text")
    with pytest.raises(UserError, match="--mask-key trained: .*a.txt is text, needs jsonl"):
        preprocess(job, progress=False)
    with pytest.raises(UserError, match="--engine fast: .*--mask-key"):
        preprocess(replace(job, engine="fast"), progress=False)
