# SPDX-License-Identifier: Apache-2.0
"""Draws the cases of RULER's tasks: needles, chains of variables, words to count, questions."""

from __future__ import annotations

import math
import string
import uuid
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.evaluation.ruler.materials import Materials, QuestionSet, RulerQuestion
from megatron_cream.evaluation.ruler.sampler import (
    COMMON,
    DOCUMENT,
    FREQUENT,
    NEEDLE,
    NIAH,
    NOISE,
    QUESTIONS,
    VARIABLES,
    CaseSampler,
    RulerCase,
    RulerText,
    fill,
)

DEPTHS = list(np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int))
"""Places in an essay, in percent."""

HOPS = 4
EXAMPLE_LENGTH = 500
"""Tokens of the worked example of ``vt``, at most."""
_EXAMPLE_VALUE = "12345"
_EXAMPLE_STEP = 5

COMMON_WORDS = 10
CODED_LETTERS = 6
_WORDS_STEP = 10
_PROBE = 4096  # words of the case that tells how many tokens a word has
_ZETA_2 = math.pi**2 / 6  # the counts are zeta-distributed with exponent 2
_QUESTIONS_STEP = 10


@dataclass(frozen=True)
class NeedleKind:
    """One of the eight tasks that ask for needles by a key, in one of three haystacks.

    Attributes:
        haystack: ``noise``, ``essay``, or ``needle`` for needles nobody asks for.
        key, value: ``words``, ``numbers`` or ``uuids``.
        keys: needles of different keys.
        values: needles of one key.
        queries: keys asked for; there are at least so many.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


def make_needles(
    sampler: CaseSampler, task: str, materials: Materials, cases: int, kind: NeedleKind
) -> list[RulerCase]:
    """Return the cases of a task that asks for needles."""
    texts = NeedleTexts(sampler, kind, materials)
    step = 500 if kind.haystack == "essay" else 25 if sampler.length >= 4096 else 5
    size = sampler.find_size(texts.draw, step, NIAH.new_tokens)
    return [sampler.draw_case(task, texts.draw, size, step, NIAH) for _ in range(cases)]


@dataclass
class NeedleTexts:
    """Draws the texts of a task that asks for needles."""

    sampler: CaseSampler
    kind: NeedleKind
    materials: Materials

    def draw(self, size: int) -> RulerText:
        """Return a case with ``size`` words of an essay, or sentences."""
        kind = self.kind
        keys, values = [], []
        for _ in range(max(kind.keys, kind.queries)):
            keys.append(self._word(kind.key))
            values.append([self._word(kind.value) for _ in range(kind.values)])
        pairs = zip(keys, values, strict=True)
        needles = [self._needle(key, value) for key, of_key in pairs for value in of_key]
        self.sampler.shuffle(needles)
        context = (self._essay if kind.haystack == "essay" else self._lines)(size, needles)
        asked = self.sampler.random.sample(range(len(keys)), kind.queries)
        answers = [value for i in asked for value in values[i]]
        return RulerText(self._text(context, [keys[i] for i in asked]), answers)

    def _word(self, kind: str) -> str:
        draw = self.sampler.random
        if kind == "words":
            return draw.choice(self.materials.pairs)
        if kind == "numbers":
            return str(draw.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    def _needle(self, key: str, value: str) -> str:
        return fill(NEEDLE, type_needle_v=self.kind.value, key=key, value=value)

    def _essay(self, size: int, needles: list[str]) -> str:
        sentences = self.materials.sentences(size)
        depths = self.sampler.random.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths)]
        pieces = []
        for first, end, needle in zip(cuts, cuts[1:], needles, strict=False):
            pieces += [" ".join(sentences[first:end]), needle]
        return " ".join([*pieces, " ".join(sentences[cuts[-1] :])])

    def _lines(self, size: int, needles: list[str]) -> str:
        lines = [NOISE] * size
        if self.kind.haystack == "needle":
            kinds = self.kind.key, self.kind.value
            lines = [self._needle(*map(self._word, kinds)) for _ in range(size)]
        places = sorted(self.sampler.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _text(self, context: str, keys: list[str]) -> str:
        template, kind = self.sampler.template(NIAH), self.kind.value
        if self.kind.queries * self.kind.values == 1:
            # One value is asked for. RULER changes the whole template, the model's words included.
            for plural, singular in (
                ("Some", "A"),
                ("are all", "is"),
                ("are", "is"),
                ("answers", "answer"),
            ):
                template = template.replace(plural, singular)
            kind = kind[:-1]
        query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        return fill(template, type_needle_v=kind, context=context, query=query)


def make_variables(
    sampler: CaseSampler, task: str, materials: Materials, cases: int
) -> list[RulerCase]:
    """Return cases of one chain of four hops in noise, after a worked example."""
    example = _example(sampler)
    step = 10 if sampler.length >= 4096 else 5
    more = sampler.count(example) + VARIABLES.new_tokens
    size = sampler.find_size(lambda size: draw_chain(sampler, size), step, more)

    def draw(size: int) -> RulerText:
        return _with_example(sampler, draw_chain(sampler, size), example)

    return [sampler.draw_case(task, draw, size, step, VARIABLES) for _ in range(cases)]


def _example(sampler: CaseSampler) -> str:
    """Return the worked example, with its answer; names and value are drawn anew for each case."""
    short = CaseSampler(EXAMPLE_LENGTH, sampler.count, seed=sampler.seed)
    short.random, short.numpy = sampler.random, sampler.numpy  # one random state for all

    def draw(size: int) -> RulerText:
        return draw_chain(short, size, example=True)

    size = short.find_size(draw, _EXAMPLE_STEP, 0)
    try:
        made, _ = short.draw_text("vt", draw, size, _EXAMPLE_STEP, 0)
    except UserError:
        raise UserError(
            f"vt's worked example has more than RULER's {EXAMPLE_LENGTH} tokens with this "
            "tokenizer: leave vt out of --tasks"
        ) from None
    return made.text + " " + " ".join(made.answers) + "\n"


def draw_chain(sampler: CaseSampler, size: int, example: bool = False) -> RulerText:
    """Return a case with ``size`` lines of noise."""
    letters = 3 if example else 5
    names = [_letters(sampler, letters) for _ in range(HOPS + 1)]
    while len(set(names)) < HOPS + 1:
        names.append(_letters(sampler, letters))
    names = names[: HOPS + 1]
    value = _EXAMPLE_VALUE if example else str(sampler.numpy.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS)]
    lines = [NOISE] * size
    places = sorted(sampler.random.sample(range(size), len(chain)))
    for i, (place, link) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + i, link)
    context = "\n".join(lines).replace(". \n", ".\n")
    template = sampler.template(VARIABLES)
    return RulerText(fill(template, context=context, query=value, num_v=HOPS + 1), names)


def _letters(sampler: CaseSampler, count: int) -> str:
    return "".join(sampler.random.choices(string.ascii_uppercase, k=count))


def _with_example(sampler: CaseSampler, made: RulerText, example: str) -> RulerText:
    for name in example.split()[-HOPS - 1 :]:
        example = example.replace(name, _letters(sampler, len(name)))
    example = example.replace(_EXAMPLE_VALUE, str(sampler.numpy.randint(10000, 99999)))
    at = made.text.index(VARIABLES.template[:20])  # after what the model's template begins with
    return RulerText(made.text[:at] + example + "\n" + made.text[at:], made.answers)


def make_common_words(
    sampler: CaseSampler, task: str, materials: Materials, cases: int
) -> list[RulerCase]:
    """Return cases of the ten most common words, each after a worked example."""
    words = list(materials.words)
    sampler.shuffle(words)
    # words of the example, how often its common and other words stand, and the same of the case
    long = sampler.length >= 4096
    example, common, other = (40, (10, 3), (30, 3)) if long else (20, (3, 1), (6, 1))
    template = sampler.template(COMMON)

    def list_words(size: int, often: tuple[int, int]) -> tuple[str, list[str]]:
        enough = _enough_words(words, materials, size, sampler.length)
        listed = sampler.random.sample(enough, size)
        answers = listed[:COMMON_WORDS]
        listed = answers * often[0] + listed[COMMON_WORDS:] * often[1]
        sampler.shuffle(listed)
        return fill(template, context=_numbered(listed)), answers

    def draw(size: int) -> RulerText:
        shot, shown = list_words(example, common)
        text, answers = list_words(size, other)
        return RulerText(f"{shot} {_numbered(shown)}\n{text}", answers)

    per_word = sampler.count(draw(_PROBE).text) / _PROBE
    estimate = int(sampler.length // per_word) * 2
    size = sampler.find_size(draw, _WORDS_STEP, COMMON.new_tokens, estimate)
    return [sampler.draw_case(task, draw, size, _WORDS_STEP, COMMON) for _ in range(cases)]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _enough_words(words: list[str], materials: Materials, size: int, length: int) -> list[str]:
    """Return the list to sample from: RULER's second one where the first is too short.

    Raises:
        UserError: the second one is needed and not given, or is too short as well.
    """
    if size <= len(words):
        return words
    if size > len(materials.more_words):
        raise UserError(
            f"cwe of {length} tokens needs {size} words: there are {len(words)} and "
            f"{len(materials.more_words)} in --words; give RULER's english_words.json"
        )
    return materials.more_words


def make_frequent_words(
    sampler: CaseSampler, task: str, materials: Materials, cases: int
) -> list[RulerCase]:
    """Return cases of the three most frequent invented words."""
    too_short = f"--lengths has {sampler.length}: it is too short for {task}"
    most = sampler.length - FREQUENT.new_tokens
    kinds, step = most // 50, most // 32
    if kinds < COMMON_WORDS:
        raise UserError(f"{too_short}, which needs at least 550")
    template = sampler.template(FREQUENT)

    def text(words: list[str], size: int) -> str:
        times = size * (np.arange(1, len(words) + 1) ** -2.0) / _ZETA_2
        listed = [word for word, n in zip(words, times.astype(int), strict=True) for _ in range(n)]
        sampler.shuffle(listed)
        return fill(template, context=" ".join(listed))

    words, size = _coded_words(sampler, kinds), most // CODED_LETTERS
    while sampler.count(text(words, size)) < most:
        size += step
    size -= step
    made = []
    for _ in range(cases):
        words, fits = _coded_words(sampler, kinds), size
        while (tokens := sampler.count(text(words, fits))) > most:
            fits -= step
            if fits <= 0:
                raise UserError(too_short)
        one = RulerText(text(words, fits), words[1:4])
        made.append(one.split(FREQUENT.prefix, tokens + FREQUENT.new_tokens))
    return made


def _coded_words(sampler: CaseSampler, count: int) -> list[str]:
    """Return invented words, the most frequent first, which is noise."""
    found: list[str] = []
    while len(found) < count or len(set(found)) < count:
        letters = sampler.random.choices(string.ascii_lowercase, k=CODED_LETTERS)
        found.append("".join(letters))
    words = sorted(set(found))
    sampler.shuffle(words)
    return ["...", *words[1:]]


def make_questions(
    sampler: CaseSampler, task: str, materials: Materials, cases: int, form: str
) -> list[RulerCase]:
    """Return questions about documents among others; case i asks the i-th question of the file.

    Args:
        form: of the file, ``squad`` or ``hotpot``.

    Raises:
        UserError: the file has fewer questions.
    """
    questions: QuestionSet = getattr(materials, form)
    if cases > len(questions.asked):
        raise UserError(
            f"--samples is {cases}: it must be at most {len(questions.asked)} for {task}, as many "
            "as --qa has questions"
        )
    template = sampler.template(QUESTIONS)

    def draw(asked: RulerQuestion, size: int) -> RulerText:
        documents = choose_documents(sampler, questions.documents, asked, size)
        context = "\n\n".join(
            fill(DOCUMENT, i=i, document=text) for i, text in enumerate(documents, 1)
        )
        return RulerText(fill(template, context=context, query=asked.question), asked.answers)

    size = sampler.find_size(
        partial(draw, questions.asked[0]), _QUESTIONS_STEP, QUESTIONS.new_tokens
    )
    return [
        sampler.draw_case(task, partial(draw, asked), size, _QUESTIONS_STEP, QUESTIONS)
        for asked in questions.asked[:cases]
    ]


def choose_documents(
    sampler: CaseSampler, documents: list[str], asked: RulerQuestion, size: int
) -> list[str]:
    """Return ``size`` documents, those of the question among them: no others where it has more.

    RULER goes on for ever where a case is too long and with fewer documents has too few.
    """
    size = max(size, len(asked.own))
    missing = size - len(asked.own)
    if size >= len(documents):
        chosen = (documents * -(-size // len(documents)))[:size]
    elif missing <= len(asked.near):
        numbers = asked.own + sampler.random.sample(asked.near, missing)
        chosen = [documents[i] for i in numbers]
    else:
        known = asked.own + asked.near
        taken = set(known)
        others = [i for i in range(len(documents)) if i not in taken]
        numbers = known + sampler.random.sample(others, max(0, size - len(known)))
        chosen = [documents[i] for i in numbers]
    sampler.shuffle(chosen)
    return chosen
