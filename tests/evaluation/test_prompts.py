# SPDX-License-Identifier: Apache-2.0
"""Cases have exactly the asked length, the answer in the context, and depend on the seed alone."""

import gzip
import json
import lzma
import re
from collections import Counter

import numpy as np
import pytest

from megatron_cream.corpus.tokenizers import ByteLevelTokenizer, load_tokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import TASKS, read_haystacks
from megatron_cream.evaluation.prompts import HaystackBuilder, Prompt, render

LENGTH = 3001


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("The pass key is 12345.\nline amber-oak: REGISTER_CONTENT is <67890>\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer("SentencePieceTokenizer", folder / "tokenizer.model")


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def prompt(request, small_hf):
    if request.param == "bytes":
        return Prompt(ByteLevelTokenizer())
    if request.param == "bpe":
        return Prompt(load_tokenizer("HuggingFaceTokenizer", small_hf))
    return Prompt(request.getfixturevalue("sentencepiece"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shots", [0, 1])
def test_exact_length_and_answer(prompt, task, shots):
    kit = HaystackBuilder(prompt, [TASKS[task].shot(i) for i in range(shots)])
    made = kit.make(TASKS[task], LENGTH + 1000 * shots, 5, 2)
    assert sum(len(haystack.tails) for haystack in made) == 2
    for haystack in made:
        for tail in haystack.tails:
            assert len(haystack.context) + len(tail.tokens) == LENGTH + 1000 * shots
            assert sum(tail.items) == len(tail.answer) > 0
            text = prompt.tokenizer.decode(haystack.context)
            answer = prompt.tokenizer.decode(tail.answer).strip()
            for item in answer.split(", "):
                assert item in text


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_is_a_case(prompt, task):
    kit = HaystackBuilder(prompt)
    first, again, other = (kit.make(TASKS[task], LENGTH, seed, 2) for seed in (5, 5, 6))
    for left, right in zip(first, again, strict=True):
        assert np.array_equal(left.context, right.context)
        for one, two in zip(left.tails, right.tails, strict=True):
            assert np.array_equal(one.tokens, two.tokens)
    assert not np.array_equal(first[0].tails[0].answer, other[0].tails[0].answer)


def test_needle_is_the_same_at_every_length(small_hf):
    prompt = Prompt(load_tokenizer("HuggingFaceTokenizer", small_hf))
    needle = prompt.encode(" The pass key is")
    for length in range(900, 930):
        for haystack in HaystackBuilder(prompt).make(TASKS["passkey"], length, 0, 3):
            context = haystack.context.tolist()
            at = [i for i in range(len(context)) if context[i : i + len(needle)] == needle.tolist()]
            assert len(at) == 1
            answer = haystack.tails[0].answer
            end = at[0] + len(needle)
            found = context[end : end + len(answer) + 1]
            assert answer.tolist() in (found[:-1], found[1:])  # a lone space is not scored


def test_depths(small_hf):
    prompt = Prompt(load_tokenizer("HuggingFaceTokenizer", small_hf))
    made = HaystackBuilder(prompt).make(TASKS["passkey"], 4000, 0, 5)
    places = []
    for haystack in made:
        text = prompt.tokenizer.decode(haystack.context)
        places.append(text.index("The pass key") / len(text))
    assert [haystack.tails[0].where for haystack in made] == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(places, [0.05, 0.27, 0.5, 0.74, 0.98], atol=0.06)


def test_a_lone_space_is_not_scored():
    made = HaystackBuilder(Prompt(ByteLevelTokenizer())).make(TASKS["passkey"], 2000, 0, 1)
    tail = made[0].tails[0]
    assert tail.items == (5,)
    assert bytes(tail.answer.astype(np.uint8)).isdigit()
    assert tail.tokens[-6] == ord(" ")


@pytest.mark.parametrize("task", TASKS)
def test_too_short(task):
    with pytest.raises(ValueError, match=f"--lengths has 64: {task} needs at least"):
        HaystackBuilder(Prompt(ByteLevelTokenizer())).make(TASKS[task], 64, 0, 2)


def test_chat_template(small_hf):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", small_hf)
    template = "{{ bos_token }}{% for m in messages %}<{{m.role}}>{{m.content}}</>{% endfor %}[A]"
    assert render(template, tokenizer) == ("<user>", "</>[A]")
    with pytest.raises(ValueError, match="does not render"):
        render("{% for %}", tokenizer)
    with pytest.raises(ValueError, match="leaves out"):
        render("nothing", tokenizer)
    with pytest.raises(ValueError, match="--prompt is chat: the tokenizer .* has no chat template"):
        Prompt(tokenizer, "chat", folder=small_hf)
    with pytest.raises(ValueError, match="--prompt is 'poem'"):
        Prompt(tokenizer, "poem")


def test_published_lines(tmp_path):
    line = "line torpid-kid: REGISTER_CONTENT is <2416>\n"
    record = {
        "random_idx": ["torpid-kid", 1],
        "expected_number": 2416,
        "correct_line": line,
        "prompt": f"line a-b: REGISTER_CONTENT is <1>\n{line}I need the number. ",
    }
    path = tmp_path / "cases.jsonl.xz"
    with lzma.open(path, "wt") as file:
        file.write(json.dumps(record) + "\n")
    kit = HaystackBuilder(Prompt(ByteLevelTokenizer()))
    (case,) = read_haystacks("longchat-lines", str(path), kit, 5, 3)
    assert kit.prompt.tokenizer.decode(case.context) == record["prompt"].rstrip()
    assert kit.prompt.tokenizer.decode(case.tails[0].answer) == "2416"


def test_published_pairs_move_to_the_gold_place(tmp_path):
    pairs = [["k0", "v0"], ["k1", "v1"], ["k2", "v2"], ["k3", "v3"], ["k4", "v4"]]
    path = tmp_path / "cases.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"ordered_kv_records": pairs, "key": "k1", "value": "v1"}) + "\n")
    kit = HaystackBuilder(Prompt(ByteLevelTokenizer()))
    made = read_haystacks("kv-retrieval", str(path), kit, 5, 3)
    texts = [kit.prompt.tokenizer.decode(one.context) for one in made]
    order = [[text.index(f'"k{i}"') for i in range(5)] for text in texts]
    assert [sorted(range(5), key=places.__getitem__).index(1) for places in order] == [0, 2, 4]
    assert [one.tails[0].where for one in made] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("kv-retrieval", "", "it is empty"),
        ("kv-retrieval", "{", "must be a JSONL file"),
        ("kv-retrieval", '{"prompt": 1}\n', "case 1 is not of kv-retrieval"),
        ("passkey", "{}\n", "passkey has none"),
    ],
)
def test_bad_published_files(tmp_path, task, content, message):
    path = tmp_path / "cases.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"--cases-file .*{message}"):
        read_haystacks(task, str(path), HaystackBuilder(Prompt(ByteLevelTokenizer())), 5, 3)


def text_of(task, cases, length=LENGTH, seed=5):
    """What a case says: its context, and question with answer of each tail."""
    prompt = Prompt(ByteLevelTokenizer())
    for haystack in HaystackBuilder(prompt).make(TASKS[task], length, seed, cases):
        decode = prompt.tokenizer.decode
        yield decode(haystack.context), [decode(tail.tokens) for tail in haystack.tails]


def test_variables_are_assigned_in_the_order_of_the_answer():
    ((context, tails),) = text_of("variable-tracking", 3)
    for tail in tails:
        value = tail.split("assigned the value ")[1].split(" ")[0]
        chain = tail.split("are:")[1].strip().split(", ")
        assert len(chain) == 5
        sources = [value, *(f"VAR {name}" for name in chain)]
        texts = [f" VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)]
        places = [context.index(text) for text in texts]
        assert places == sorted(places)


@pytest.mark.parametrize(("length", "times"), [(4095, (10, 1)), (12000, (30, 3))])
def test_common_words_are_the_most_common(length, times):
    for context, (tail,) in text_of("common-words", 2, length):
        listed = [line.split(". ")[1] for line in context.split("most often.\n")[1].splitlines()]
        counts = Counter(listed)
        answer = tail.split("are:")[1].strip().split(", ")
        assert answer == sorted(answer) and len(answer) == 10
        assert {counts.pop(word) for word in answer} == {times[0]}
        assert set(counts.values()) == {times[1]}


def test_frequent_words_are_the_most_frequent():
    for context, (tail,) in text_of("frequent-words", 2):
        words = context.split("coded words.\n")[1].split()
        counts = [word for word, _ in Counter(words).most_common(4)]
        assert counts[0] == "..."
        assert tail.split("are:")[1].strip().split(", ") == counts[1:]


def test_key_value_pairs_are_json_with_every_answer():
    ((context, tails),) = text_of("kv-retrieval", 3)
    pairs = json.loads(context.split("JSON data:\n")[1])
    for tail in tails:
        key, value = re.search(r'Key: "(.*)"\nCorresponding value: "(.*)', tail).groups()
        assert pairs[key] == value


def test_query_aware_cases_name_the_key_on_both_sides_of_the_same_pairs():
    kit = HaystackBuilder(Prompt(ByteLevelTokenizer()))
    decode = kit.prompt.tokenizer.decode
    (plain,) = kit.make(TASKS["kv-retrieval"], LENGTH, 5, 3)
    cases = kit.make(TASKS["kv-retrieval"], LENGTH, 5, 3, None, True)
    shared = json.loads(decode(plain.context).split("JSON data:\n")[1])
    places = []
    for case in cases:
        (tail,) = case.tails
        key = re.search(r'\nKey: "(.*)"\nCorresponding', decode(tail.tokens))[1]
        before, found = decode(case.context).split("JSON data:\n")
        assert before.endswith(f'\n\nKey: "{key}"\n\n')
        pairs = json.loads(found)
        assert pairs.items() <= shared.items() and len(pairs) >= len(shared) - 3
        assert decode(tail.answer).strip('"\n') == pairs[key]
        assert len(case.context) + len(tail.tokens) == LENGTH
        places.append(list(pairs).index(key) / (len(pairs) - 1))
    assert places == pytest.approx([0, 0.5, 1], abs=0.1)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.records])
def test_records_of_a_shorter_case_spread_over_a_longer_one(prompt, task):
    kit, decode = HaystackBuilder(prompt), prompt.tokenizer.decode
    (near,) = kit.make(TASKS[task], LENGTH, 5, 3)
    (far,) = kit.make(TASKS[task], 3 * LENGTH, 5, 3, LENGTH)
    assert len(far.context) + len(far.tails[0].tokens) == 3 * LENGTH
    record = re.compile(r"REGISTER_CONTENT is <\d+>|\"[-0-9a-f]{36}\": \"[-0-9a-f]{36}\"")
    found = [record.findall(decode(one.context)) for one in (near, far)]
    assert found[0] == found[1] and len(found[0]) > 20
    answers = [[decode(tail.answer) for tail in one.tails] for one in (near, far)]
    assert answers[0] == answers[1]
    places = [one.start() for one in record.finditer(decode(far.context))]
    gaps = np.diff(places)
    assert gaps.max() < 6 * np.median(gaps), "the records stand all over it"
    (same,) = kit.make(TASKS[task], LENGTH, 5, 3, LENGTH)
    assert np.array_equal(same.context, near.context)


def test_records_are_of_tasks_that_have_some():
    from support.arguments import arguments

    for changes in ({"tasks": ["needle"]}, {"tasks": ["kv-retrieval"], "cases_file": "f"}):
        with pytest.raises(UserError, match="--records-of is 2048 .* longchat-lines and kv-"):
            arguments(hf="h", records_of=2048, **changes).validate()


def test_query_aware_is_of_key_value_pairs():
    from support.arguments import arguments

    for changes, message in (
        ({"tasks": ["needle"]}, "--query-aware is given for needle"),
        ({"tasks": ["kv-retrieval"], "shots": 2}, "--query-aware with --shots 2"),
    ):
        with pytest.raises(UserError, match=message):
            arguments(hf="h", query_aware=True, **changes).validate()
