# SPDX-License-Identifier: Apache-2.0
"""RULER's cases are those of its own scripts, its figures those it publishes.

data/ruler.json has hashes of cases that NVIDIA/RULER's scripts wrote on invented material
(tests/attack/make_ruler_cases.py).
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import ruler as given

from megatron_cream.errors import UserError
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.ruler import Materials, make_cases
from megatron_cream.evaluation.ruler.materials import (
    QuestionSet,
    RulerQuestion,
    WordPairs,
    _listed,
)

THEIRS = json.loads((Path(__file__).parent / "data" / "ruler.json").read_text("utf-8"))
ALIKE = [(task, setting) for task, settings in THEIRS.items() for setting in settings]


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """Everything the tasks need, read from files."""
    folder = tmp_path_factory.mktemp("ruler")
    contents = {"essay": {"text": given.essay()}, "squad": given.squad(), "hotpot": given.hotpot()}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    questions = dict(ruler.read_questions(folder / f"{name}.json") for name in ("squad", "hotpot"))
    made = Materials(ruler.read_haystack(folder / "essay.json"), **questions, split=given.cut)
    made.pairs = WordPairs(
        _listed("adjectives")[::30], _listed("nouns")[::30]
    )  # as there, for time
    return made


def test_all_tasks_are_held():
    assert tuple(THEIRS) == ruler.TASKS and len(ruler.TASKS) == 13


@pytest.mark.parametrize(("task", "setting"), ALIKE)
def test_cases_are_those_of_rulers_scripts(task, setting, materials):
    style, length = setting.split()
    template = ruler.MODEL_TEMPLATES[style]
    theirs = THEIRS[task][setting]
    cases = make_cases(task, int(length), len(theirs), given.count, materials, template)
    found = [
        given.fingerprint(case.prompt, case.prefix, list(case.answers), case.length)
        for case in cases
    ]
    assert found == theirs
    for case in cases:
        tokens = given.count(case.prompt + case.prefix) + ruler.new_tokens(task)
        assert tokens == case.length <= int(length)


def test_all_keys_are_rulers():
    """Hashes of the first cases that RULER's script wrote with its whole list of keys."""
    theirs = ["447f54870e30984b", "72a0967f75aeed48", "e5559f6576364155"]
    cases = make_cases("niah_single_1", 1536, 3, given.count)
    found = [given.fingerprint(c.prompt, c.prefix, list(c.answers), c.length) for c in cases]
    assert found == theirs


def test_what_needs_no_file():
    without = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
    assert ruler.available(Materials()) == without
    for task in set(ruler.TASKS) - set(without):
        with pytest.raises(UserError, match=f"{task} needs --(haystack|qa) FILE"):
            make_cases(task, 4096, 1, given.count)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_too_short_a_length_is_refused(task):
    with pytest.raises(UserError, match="--lengths has 200: it is too short for"):
        make_cases(task, 200, 1, given.count)


def test_a_long_question_has_no_others_documents_rather_than_none():
    """The first questions' documents are short, so that many fit; those of the last fit alone."""
    short = [f"word {i}." for i in range(300)]
    long = [f"{i} " + "much " * 30 for i in range(10)]
    asked = [RulerQuestion("q", ["a"], list(range(10)), [])]
    asked += [RulerQuestion("r", ["b"], list(range(300, 310)), [])]
    materials = Materials(hotpot=QuestionSet(asked, short + long))
    for length in range(300, 600):
        try:
            first, last = make_cases("qa_2", length, 2, lambda text: len(text.split()), materials)
        except UserError as error:
            assert f"--lengths has {length}: it is too short for qa_2" in str(error)
        else:
            break
    assert last.length == length, "the shortest that has its own documents"
    assert last.prompt.count("Document ") == 10 and all(text in last.prompt for text in long)
    assert first.prompt.count("Document ") > 20


def test_a_list_that_is_too_short_for_the_length_is_refused():
    with pytest.raises(UserError, match="give RULER's english_words.json"):
        make_cases("cwe", 400_000, 1, lambda text: len(text) // 5)


@pytest.mark.parametrize("content", ["", "[", "{}", "[{}]", '{"data": []}', '{"data": [1]}', "7"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(content)
    for read, flag in (
        (ruler.read_questions, "--qa"),
        (ruler.read_haystack, "--haystack"),
        (ruler.read_words, "--words"),
    ):
        with pytest.raises(UserError, match=f"{flag} is "):
            read(path)


def test_pairs_are_the_sorted_list():
    adjectives, nouns = ["blue", "old", "blue-eyed", "able"], ["eyed-cat", "cat", "dog", "zoo"]
    pairs = WordPairs(adjectives, nouns)
    assert list(pairs) == sorted({f"{a}-{n}" for a in adjectives for n in nouns})


def test_scores():
    answers = [["Alpha", "beta"], ["gamma", "delta"]]
    written = ["it is ALPHA\x00beta", "gamm, then Delta."]
    assert ruler.score("vt", written, answers) == 75.0
    assert ruler.score("qa_1", written, answers) == 100.0
    assert ruler.score("qa_2", ["none", "delta"], answers) == 50.0
    assert ruler.score("cwe", ["", "", ""], [["a"]] * 3) == 0.0
    assert ruler.score("fwe", ["a", "", ""], [["a"]] * 3) == 33.33


def test_published_averages():
    """The row of Jamba-1.5-large in RULER's README: 96.0, 95.7 and 96.3 over six lengths."""
    lengths = [4096 * 2**i for i in range(6)]
    row = dict(zip(lengths, [96.7, 96.6, 96.4, 96.0, 95.4, 95.1], strict=True))
    increasing, decreasing = ruler.weighted_averages(dict(reversed(row.items())))
    assert ruler.average(row) == pytest.approx(96.0, abs=0.05)
    assert increasing == pytest.approx(95.75, abs=0.01)
    assert decreasing == pytest.approx(96.32, abs=0.01)


def test_effective_length():
    averages = {4096: 98.0, 8192: 85.6, 16384: 85.5}
    assert ruler.effective_length(averages) == 8192
    assert ruler.effective_length(averages, 99) is None
    assert ruler.effective_length(averages, 80) == 16384


class TestLmEval:
    """The port in lm-eval's package draws the same under the same random state."""

    @pytest.fixture
    def port(self):
        """Import one module of lm-eval's port."""

        def load(name):
            reason = "lm-eval's RULER is not installed: pip install 'lm-eval[ruler]'"
            pytest.importorskip("lm_eval", reason=reason)
            return pytest.importorskip(f"lm_eval.tasks.ruler.{name}", reason=reason)

        return load

    @pytest.mark.parametrize("task", list(ruler.NEEDLES))
    def test_needles(self, task, port, materials, monkeypatch):
        from megatron_cream.evaluation.ruler.cases import NeedleTexts
        from megatron_cream.evaluation.ruler.sampler import CaseSampler

        theirs = port("prepare_niah")
        monkeypatch.setattr(theirs, "cached_sent_tokenize", given.cut)
        kind = ruler.NEEDLES[task]
        haystack = {"noise": "repeat"}.get(kind.haystack, kind.haystack)
        random.seed(7)
        text, answers, _ = theirs.generate_input_output(
            200,
            materials.essay if haystack == "essay" else theirs.get_haystack(haystack),
            type_haystack=haystack,
            num_needle_k=max(kind.keys, kind.queries),
            type_needle_k=kind.key,
            num_needle_v=kind.values,
            type_needle_v=kind.value,
            template=port("niah_utils").TEMPLATE,
            num_needle_q=kind.queries,
        )
        sampler = CaseSampler(4096, given.count)
        sampler.random.seed(7)
        whole = Materials(materials.essay, split=given.cut)  # with all keys
        case = NeedleTexts(sampler, kind, whole).draw(200).split(" The special", 0)
        assert (case.prompt, list(case.answers)) == (text, answers)

    def test_frequent_words(self, port):
        theirs = port("fwe_utils")
        random.seed(42)
        rows = theirs.sys_kwext(_tokenizer, 2048, num_samples=2)
        # The port does not take the tokens to generate off the length.
        cases = make_cases("fwe", 2048 + ruler.new_tokens("fwe"), 2, given.count)
        for row, case in zip(rows, cases, strict=True):
            assert (case.prompt, list(case.answers)) == (row["input"], row["outputs"])

    @pytest.mark.parametrize("kind", ["squad", "hotpot"])
    def test_questions(self, kind, port, materials):
        from megatron_cream.evaluation.ruler.cases import choose_documents
        from megatron_cream.evaluation.ruler.sampler import DOCUMENT, CaseSampler, fill

        theirs, file = port("qa_utils"), getattr(materials, kind)
        qas = [
            {"query": a.question, "outputs": a.answers, "context": a.own, "more_context": a.near}
            for a in file.asked
        ]
        random.seed(3)
        sampler = CaseSampler(4096, given.count)
        sampler.random.seed(3)
        for index in range(3):
            text, _ = theirs.generate_input_output(index, 14, qas, file.documents)
            mine = choose_documents(sampler, file.documents, file.asked[index], 14)
            for i, document in enumerate(mine):
                assert fill(DOCUMENT, i=i + 1, document=document) in text

    def test_chain(self, port):
        from megatron_cream.evaluation.ruler.cases import draw_chain
        from megatron_cream.evaluation.ruler.sampler import CaseSampler

        theirs = port("vt_utils")
        random.seed(42)
        np.random.seed(42)
        _, answers = theirs.generate_input_output(60, 1, 4)
        assert draw_chain(CaseSampler(4096, given.count), 60).answers == answers

    def test_scores(self, port):
        theirs = port("common_utils")
        written, answers = ["it is ALPHA\x00beta"], ["Alpha", "gamma"]
        cleaned = theirs.postprocess_pred(written)
        mine = ruler.score("vt", written, [answers])
        assert mine == 100 * theirs.string_match_all(cleaned, [answers])


def _tokenizer(text):
    return SimpleNamespace(input_ids=given.tokens(text))
