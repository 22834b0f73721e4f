# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_cream.corpus import retrieval as documents
from megatron_cream.corpus import retrieval_tasks as tasks
from megatron_cream.corpus import retrieval_words as words
from megatron_cream.corpus.retrieval import DocumentMaker, RetrievalConfig, make_dataset
from megatron_cream.corpus.retrieval_words import Haystack, read_haystack
from megatron_cream.corpus.tokenizers import load_tokenizer, train_bpe
from megatron_cream.data.indexed import DatasetFiles, read_metadata
from megatron_cream.errors import UserError
from megatron_cream.evaluation import task_texts
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.prompts import HaystackBuilder, Prompt
from megatron_cream.positions import make_strategy, philox

LENGTH = 2048
TEXT = "It was late when they came home. Nobody had asked for them, and nobody did.\n" * 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [words.prose(rng, 20000), "".join(f'"{u}": {u}\n' for u in words.uuids(rng, 200))]
    return train_bpe(texts, 600, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def maker(tokenizer):
    return DocumentMaker(tokenizer, LENGTH, 1234, Haystack([TEXT]))


@pytest.fixture(scope="module")
def texts(maker):
    return ["".join(maker.task_texts(number)) for number in range(120)]


def test_documents_have_exactly_so_many_tokens_and_are_the_text_that_was_meant(maker):
    for number in range(40):
        tokens, parts = maker.make(number), maker.task_texts(number)
        assert tokens.shape == (LENGTH,) and tokens.dtype == np.int64
        own = "".join(parts)
        assert maker.tokenizer.decode(tokens).endswith(own)
        # Task by task they are the tokens of the text as a whole.
        whole = maker.encode(own)
        assert (tokens[LENGTH - len(whole) :] == whole).all()


def test_a_document_is_a_pure_function_of_seed_and_number(tokenizer, maker):
    other = DocumentMaker(tokenizer, LENGTH, 1234, Haystack([TEXT]))
    assert (other.make(5) == maker.make(5)).all()
    assert not (maker.make(6) == maker.make(5)).all()
    assert not (
        DocumentMaker(tokenizer, LENGTH, 1, Haystack([TEXT])).make(5) == maker.make(5)
    ).all()


def test_tasks_fill_their_documents(maker):
    shares = [
        sum(len(maker.encode(text)) for text in maker.task_texts(number)) / LENGTH
        for number in range(60)
    ]
    assert np.mean(shares) > 0.8


@pytest.mark.parametrize("name", list(tasks.RECORDS))
def test_every_question_asks_for_a_fact_that_stands_before_it(name, monkeypatch):
    monkeypatch.setattr(tasks, "RECORDS", {name: tasks.RECORDS[name]})
    monkeypatch.setattr(tasks, "KEYS", {"uuids": words.KEYS["uuids"]})
    monkeypatch.setattr(tasks, "VALUES", {"numbers": words.digits(9, 9)})
    key, value = (
        re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        re.compile(r"\b\d{9}\b"),
    )
    for seed in range(12):
        text = tasks._records(philox.generator(seed, 0), 8000).text(40)
        keys, values = key.findall(text), value.findall(key.sub("", text))
        facts, asked = {}, 0
        # A key may be named twice in a question; its value follows the last time.
        marks = re.findall(f"{key.pattern}|{value.pattern}", text)
        for before, mark in zip(marks, marks[1:], strict=False):
            if key.fullmatch(before) and value.fullmatch(mark):
                asked += before in facts
                assert facts.setdefault(before, mark) == mark
        assert len(facts) == 40 and asked >= 4, name
        assert len(values) == 40 + asked and len(keys) >= len(values)


def test_more_questions_when_more_are_asked_for():
    def asked(most):
        drawn = (tasks._records(philox.generator(seed, 0), 8000, most) for seed in range(60))
        return [one.text(200).count("?") for one in drawn]

    few, many = asked(8), asked(64)
    assert max(few) <= 16 and np.mean(many) > 4 * np.mean(few)


def test_one_task_fills_a_document_where_that_is_asked_for():
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    one, some = (DocumentMaker(tokenizer, 4096, 3, tasks=most) for most in (1, 4))
    counts = [[len(maker.task_texts(number)) for number in range(40)] for maker in (one, some)]
    assert set(counts[0]) == {1} and set(counts[1]) == {1, 2, 3, 4}
    assert np.mean([len(one.task_texts(number)[0]) for number in range(40)]) > 0.9 * 4096


def test_answers_stand_anywhere():
    task = [tasks._records(philox.generator(seed, 0), 4000) for seed in range(150)]
    places = []
    for one in task:
        text = one.text(60)
        asked = text.rstrip().rsplit(" ", 1)[-1].strip("\"'<>[].,;)")
        places.append(text.find(asked) / len(text))
    assert np.histogram(places, bins=3, range=(0, 1))[0].min() > 15


def eval_cases():
    """Cases of every task of the evaluation, as text."""
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    kit = HaystackBuilder(Prompt(tokenizer))
    for name, task in TASKS.items():
        for one in kit.make(task, 8000, 0, 3):
            questions = [tokenizer.decode(tail.tokens) for tail in one.tails]
            yield name, tokenizer.decode(one.context), questions


def test_nothing_of_the_evaluation_stands_in_a_document(texts):
    ours = "".join(texts)
    assert not set(words.ADJECTIVES) & set(task_texts.ADJECTIVES)
    assert not set(words.NOUNS) & set(task_texts.NOUNS)
    # Version 4 of UUIDs is the evaluation's.
    version = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-")
    assert set(version.findall(ours)) == set(words.UUID_VERSIONS)
    for name, context, questions in eval_cases():
        if name == "kv-retrieval":
            assert set(version.findall(context)) == {"4"}
        wording = re.split(r"[\d<\"]", context)[0][:60]
        assert len(wording) > 20 and wording not in ours, name
        for question in questions:
            cue = question.strip().split("\n")[0]
            assert cue not in ours, (name, cue)


@pytest.mark.parametrize("phrase", ["REGISTER_CONTENT", "special magic", "pass key", "museum"])
def test_no_template_has_a_phrase_of_the_evaluation(phrase):
    assert phrase not in repr(words.WORDINGS)


def test_a_number_without_a_key_is_never_as_long_as_a_passkey():
    rng = np.random.default_rng(0)
    lengths = {len(word) for _ in range(200) for word in words.passkeys(rng, 3)}
    assert lengths == {3, 4, 6, 7, 8, 9}


@pytest.mark.parametrize("kind", sorted(words.KEYS))
def test_keys_are_all_different(kind):
    keys = words.KEYS[kind](np.random.default_rng(0), 1000)
    assert len(set(keys)) == len(keys) == 1000


@pytest.fixture
def job(tmp_path):
    return RetrievalConfig("ByteLevelTokenizer", str(tmp_path / "a"), length=600, documents=40)


def test_the_dataset_is_the_same_for_any_number_of_workers(job, tmp_path):
    from megatron_cream.data.text_sources import make_sources

    note = make_dataset(job, progress=False)
    other = replace(job, output_prefix=str(tmp_path / "b"), workers=2)
    make_dataset(other, progress=False)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    files = DatasetFiles.open(job.output_prefix)
    index = files.index
    assert index.lengths.tolist() == [600] * 40 and index.dtype == np.uint16
    assert note == files.metadata and not files.masked
    assert (note["kind"], note["seed"], note["tokens"]) == ("retrieval", 1234, 24000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}{suffix}" for name in "ab" for suffix in (".bin", ".idx", ".json")
    ]
    # Each is a sample of a run that trains so many tokens.
    strategy = make_strategy("cream", train_length=600, target_length=2400)
    assert len(make_sources("window", index, range(len(index.lengths)), strategy)) == 40


def test_an_end_of_document_is_the_last_token(job):
    make_dataset(replace(job, append_eod=True), progress=False)
    tokens = np.fromfile(job.output_prefix + ".bin", np.uint16).reshape(40, 600)
    eod = load_tokenizer("ByteLevelTokenizer").eod
    assert (tokens[:, -1] == eod).all() and (tokens[:, :-1] != eod).all()


def test_needles_hide_in_the_text_that_is_given(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("Zebulon spoke. " * 5000)
    haystack = read_haystack([str(tmp_path)])
    maker = DocumentMaker(tokenizer, LENGTH, 1234, haystack)
    found = ["Zebulon spoke." in tokenizer.decode(maker.make(number)) for number in range(20)]
    assert sum(found) > 10


@pytest.mark.parametrize(
    ("changes", "words_"),
    [
        ({"length": 100}, "--length is 100.*at least 256"),
        ({"documents": 0}, "--documents 0: needs 1 to "),
        ({"workers": 0}, "--workers 0: needs 1 to 4096"),
        ({"questions": 0}, "--questions 0: needs 1 to "),
        ({"tasks": 5}, "--tasks 5: needs 1 to 4"),
        ({"seed": -1}, "--seed -1: needs 0 to "),
        ({"engine": "slow"}, "--engine slow: needs one of auto, fast, reference"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model"),
    ],
)
def test_what_cannot_work_is_refused(job, tmp_path, changes, words_):
    with pytest.raises(UserError, match=words_):
        make_dataset(replace(job, **changes), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_haystack_must_hold_text(job, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="--haystack.*holds no text"):
        make_dataset(replace(job, haystack=(str(tmp_path / "empty.txt"),)), progress=False)


def test_files_that_are_there_are_kept(job):
    make_dataset(job, progress=False)
    with pytest.raises(UserError, match="exists"):
        make_dataset(job, progress=False)
    make_dataset(replace(job, seed=2, overwrite=True), progress=False)
    assert read_metadata(job.output_prefix)["seed"] == 2


def runs(mask):
    """First and end of each stretch of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def answers_by_hand(text, number):
    """What follows each value that is asked for, up to the end of its line."""
    values = list(number.finditer(text))
    seen, found = set(), []
    for value in values:
        if value.group() in seen:
            found.append(text[value.start() : text.index("\n", value.start()) + 1])
        seen.add(value.group())
    return found


@pytest.mark.parametrize("name", list(tasks.RECORDS))
def test_answers_alone_are_the_values_that_are_asked_for(name, monkeypatch):
    """A value of nine digits stands once in the records; the second time it is an answer."""
    monkeypatch.setattr(tasks, "RECORDS", {name: tasks.RECORDS[name]})
    monkeypatch.setattr(tasks, "KEYS", {"uuids": words.KEYS["uuids"]})
    monkeypatch.setattr(tasks, "VALUES", {"numbers": words.digits(9, 9)})
    monkeypatch.setattr(
        documents, "draw_task", lambda rng, tokens, text, most: tasks._records(rng, tokens, most)
    )
    maker = DocumentMaker(load_tokenizer("ByteLevelTokenizer"), 4096, 3, questions=16)
    for number in range(4):
        tokens, mask = maker.make_masked(number)
        assert (tokens == maker.make(number)).all() and mask.shape == tokens.shape
        expected = []
        for text in maker.task_texts(number):
            expected += answers_by_hand(text, re.compile(r"(?<![0-9a-f-])\d{9}\b"))
        found = [maker.tokenizer.decode(tokens[a:b]) for a, b in runs(mask)]
        assert "".join(found) == "".join(expected) and len(expected) >= 4


@pytest.mark.parametrize("append_eod", [False, True])
def test_tokens_of_answers_are_all_that_is_trained(tokenizer, append_eod):
    """Of any task: with tokens of several characters, those that touch an answer and no other."""
    eod = tokenizer.eod if append_eod else None
    maker = DocumentMaker(tokenizer, LENGTH, 1234, Haystack([TEXT]), eod)
    for number in range(12):
        tokens, mask = maker.make_masked(number)
        assert (tokens == maker.make(number)).all()
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        passages = [part for task, _ in maker._tasks(number)[1] for part in task]
        answers = [part.text for part in passages if part.is_answer]
        assert all(answer.endswith("\n") for answer in answers)
        stretches = runs(mask)
        found = "".join(tokenizer.decode(tokens[a:b]) for a, b in stretches)
        for answer in answers:
            assert answer in found
        # Beside the answers there is at most part of a token on each side.
        assert len(found) <= len("".join(answers)) + 24 * len(answers)
        assert not append_eod or mask[-1] == 0


def test_answers_only_writes_a_mask_that_the_note_records(job, tmp_path):
    make_dataset(job, progress=False)
    assert not (tmp_path / "a.mask").exists()
    assert "mask_bytes" not in read_metadata(job.output_prefix)
    jobs = [
        replace(job, output_prefix=str(tmp_path / name), workers=workers, answers_only=True)
        for name, workers in (("b", 1), ("c", 2))
    ]
    notes = [make_dataset(one, progress=False) for one in jobs]
    assert notes[0] == notes[1]
    mask = np.fromfile(tmp_path / "b.mask", np.uint8)
    assert (tmp_path / "c.mask").read_bytes() == mask.tobytes()
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    assert (notes[0]["mask_bytes"], notes[0]["trained_tokens"]) == (24000, mask.sum())
    assert 0 < mask.mean() < 0.3 and notes[0]["answers_only"] is True
    # The mask goes with the dataset that it is of.
    make_dataset(replace(jobs[0], answers_only=False, overwrite=True), progress=False)
    assert not (tmp_path / "b.mask").exists()


def test_tokens_that_cannot_be_located_are_refused(maker, monkeypatch):
    true = type(maker.tokenizer).locate
    monkeypatch.setattr(type(maker.tokenizer), "locate", lambda self, text: true(self, text + "x"))
    with pytest.raises(UserError, match="--answers-only: .*--engine reference"):
        maker.make_masked(0)


def test_a_document_begins_with_bos_where_that_is_asked_for(tokenizer, job):
    """Only its filler is another: tasks and what is trained stand where they did."""
    bos, number = 7, 3
    plain = DocumentMaker(tokenizer, LENGTH, 1234)
    begun = DocumentMaker(tokenizer, LENGTH, 1234, bos=bos)
    tokens, mask = begun.make_masked(number)
    assert tokens[0] == bos and len(tokens) == len(mask) == LENGTH
    assert mask.any() and not mask[0]
    assert plain.make(number)[0] != bos
    with pytest.raises(UserError, match="--prepend-bos: ByteLevelTokenizer has none, needs"):
        make_dataset(replace(job, prepend_bos=True), progress=False)
