# SPDX-License-Identifier: Apache-2.0
"""Builds prompts of an exact token length: the tokenizer, a chat template around tasks, haystacks.

A haystack is a context and the questions asked about it. Pieces of text are encoded one by one and
joined as tokens, so that neither a neighbour nor the padding changes a needle's tokens. What is
left of the length is filled with prose in front of the task, cut at a token, and with blank lines
in front of shorter questions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_cream.checkpoint.hf_folder import find_kept_files
from megatron_cream.checkpoint.iterations import read_saved_arguments
from megatron_cream.corpus.tokenizers import Tokenizer, load_tokenizer
from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.task_texts import HaystackText, Question, prose, space_out

if TYPE_CHECKING:
    from megatron_cream.evaluation.evaluation_tasks import EvaluationTask
    from megatron_cream.evaluation.forward import ScoringModel

_MARK = "MARK-OF-THE-CONTENT"
_ANCHOR = "\n"


class Prompt:
    """A tokenizer and a style of prompt.

    Args:
        tokenizer: encodes pieces.
        style: ``base`` (plain text) or ``chat`` (the tokenizer's chat template).
        bos: whether a prompt begins with the tokenizer's bos; by default as the tokenizer itself
            does, and for SentencePiece yes.
        folder: where the tokenizer came from, with its chat template.

    Raises:
        UserError: no such style, no bos, or no chat template.
        ImportError: jinja2 is not installed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        style: str = "base",
        bos: bool | None = None,
        folder: str | None = None,
    ) -> None:
        self.tokenizer, self.style, self.folder = tokenizer, style, folder
        if style not in (styles := ("base", "chat")):
            raise UserError(f"--prompt is {style!r}: it must be one of {styles}")
        if bos and tokenizer.bos is None:
            raise UserError("--bos is given: the tokenizer has no token that begins a text")
        begins = tokenizer.bos is not None and getattr(tokenizer, "begins_with_bos", True)
        self.bos = begins if bos is None else bos
        self._cache: dict[str, np.ndarray] = {}
        chat = style == "chat"
        self._head, self._turn = render(chat_template(folder), tokenizer) if chat else ("", "")
        self._anchor = tokenizer.encode([_ANCHOR])[0]
        if not len(self._anchor):
            raise UserError("the tokenizer has no token for a line break: cases are padded with it")

    @property
    def model_template(self) -> str:
        """What stands around a task, with ``{task_template}`` in its place."""
        return f"{self._head}{{task_template}}{self._turn}"

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens int64 ``[n]`` of a piece of text.

        It is encoded after a line break whose tokens are dropped: SentencePiece begins a text, but
        not what follows a line break, with a space of its own.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Return the tokens of each piece."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        encoded = self.tokenizer.encode([_ANCHOR + text for text in new]) if new else []
        for text, tokens in zip(new, encoded, strict=True):
            if not np.array_equal(tokens[: len(self._anchor)], self._anchor):
                # The line break went into a token with the text, as two line breaks do.
                tokens = np.concatenate([self._anchor, self.tokenizer.encode([text])[0]])
            self._cache[text] = tokens[len(self._anchor) :].astype(np.int64)
        return [self._cache[text] for text in texts]

    def opening(self) -> list[np.ndarray]:
        """Return what stands before everything: bos and the chat's head."""
        pieces = [self.encode(self._head)] if self._head else []
        bos = self.tokenizer.bos
        if self.bos and not (pieces and pieces[0][0] == bos):
            pieces.insert(0, np.array([bos]))
        return pieces

    def turn(self) -> list[np.ndarray]:
        """Return what stands between the question and the answer."""
        return [self.encode(self._turn)] if self._turn else []


def chat_template(folder: str | None) -> str:
    """Return the chat template of a tokenizer's folder.

    Raises:
        UserError: it has none.
    """
    root = Path(folder or "")
    root = root if root.is_dir() else root.parent
    if folder and (root / "chat_template.jinja").is_file():
        return (root / "chat_template.jinja").read_text("utf-8")
    config = root / "tokenizer_config.json"
    template = json.loads(config.read_text("utf-8")).get("chat_template") if folder else None
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise UserError(
            f"--prompt is chat: the tokenizer {folder} has no chat template, neither "
            "chat_template.jinja nor in tokenizer_config.json; use --prompt base"
        )
    return template


def render(template: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return what a chat template puts before a user's words, and between them and the answer.

    Raises:
        UserError: a template that cannot be rendered or changes the words.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise MissingPackageError(
            "--prompt chat needs jinja2: pip install jinja2", name="jinja2"
        ) from exc
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    special = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod}
    words = {name: "" if i is None else tokenizer.decode([i]) for name, i in special.items()}
    messages = [{"role": "user", "content": _MARK}]
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **words
        )
    except TemplateError as exc:
        raise UserError(f"--prompt is chat: the chat template does not render ({exc})") from exc
    head, mark, turn = text.partition(_MARK)
    if not mark or not turn:
        raise UserError("--prompt is chat: the chat template leaves out the user's words")
    return head, turn


def open_tokenizer(settings: EvaluationSettings) -> tuple[Tokenizer, str | None]:
    """Return the tokenizer, and the folder or file it came from.

    Without --tokenizer-type it is the one in the Hugging Face folder, or the one that a trained
    checkpoint says it was trained with, or, as in an export, the one that the import keeps which
    the run goes back to.

    Raises:
        UserError, FileNotFoundError: none there, or one that cannot be read.
    """
    if settings.tokenizer_type is not None:
        path = settings.tokenizer_model
        return load_tokenizer(settings.tokenizer_type, path), path
    if settings.hf:
        return _tokenizer_in(Path(settings.hf), f"in {settings.hf}")
    checkpoint = str(settings.checkpoint)
    saved = read_saved_arguments(checkpoint)
    kind, path = (getattr(saved, name, None) for name in ("tokenizer_type", "tokenizer_model"))
    if kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer") and path and Path(path).exists():
        return load_tokenizer(kind, path), path
    try:
        kept = find_kept_files(checkpoint, saved) if saved is not None else None
    except FileNotFoundError:
        kept = None
    return _tokenizer_in(kept, f"beside {checkpoint} or the import that it goes back to")


def _tokenizer_in(folder: Path | None, where: str) -> tuple[Tokenizer, str]:
    """Return the tokenizer in a Hugging Face folder.

    Raises:
        UserError: none there.
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        return load_tokenizer("HuggingFaceTokenizer", folder), str(folder)
    if folder is not None and (model := folder / "tokenizer.model").is_file():
        return load_tokenizer("SentencePieceTokenizer", model), str(model)
    raise UserError(
        f"--tokenizer-type is not given: there is no tokenizer.json or tokenizer.model {where}; "
        "name the tokenizer as in tools/preprocess_data.py"
    )


def open_prompt(settings: EvaluationSettings) -> Prompt:
    """Return the tokenizer in the asked style.

    Raises:
        UserError, FileNotFoundError: as ``open_tokenizer``, or no such style.
    """
    tokenizer, source = open_tokenizer(settings)
    own_style = settings.tasks == ["ruler"] and settings.prompt != "chat"  # that of its cases
    return Prompt(tokenizer, "base" if own_style else settings.prompt, settings.bos, source)


def validate_vocabulary(tokenizer: Tokenizer, model: ScoringModel) -> None:
    """Refuse a tokenizer that is not the model's, as far as their sizes tell.

    A model may have some rows more than its tokenizer has tokens (Qwen's have), never fewer.

    Raises:
        UserError: naming both sizes.
    """
    most, size = model.vocabulary, tokenizer.vocab_size
    if size > most or size < 0.9 * most - 1024:
        raise UserError(
            f"--tokenizer-model has {size} tokens, {model.name} has {most}: it must be the "
            "tokenizer that the model was trained with"
        )


_ROUND = 8  # tails are a multiple of so many tokens: cases of other seeds have the same shape


@dataclass(frozen=True)
class CaseTail:
    """The end of a case in tokens: blank lines, question, cue, answer.

    Attributes:
        tokens: int64 ``[t]``.
        items: tokens of each part of the answer; together the last ones of ``tokens``.
        where: as in ``Question``.
    """

    tokens: np.ndarray
    items: tuple[int, ...]
    where: float

    @property
    def answer(self) -> np.ndarray:
        """Tokens of the answer."""
        return self.tokens[len(self.tokens) - sum(self.items) :]


@dataclass(frozen=True)
class HaystackCases:
    """Cases that share a context.

    Attributes:
        context: int64 ``[c]``.
        tails: of the same number of tokens each.
        length: tokens of a case, ``c + t``.
        seed: what it was drawn from.
        number: which one of those that task, length and seed make.
    """

    context: np.ndarray
    tails: list[CaseTail]
    length: int
    seed: int
    number: int = 0


@dataclass
class HaystackBuilder:
    """Builds haystacks out of texts.

    Attributes:
        prompt: tokenizer and the words around a task.
        shots: worked examples in front of the haystack.
    """

    prompt: Prompt
    shots: list[HaystackText] = field(default_factory=list)

    def make(
        self,
        task: EvaluationTask,
        length: int,
        seed: int,
        cases: int,
        records_of: int | None = None,
        query_aware: bool = False,
    ) -> list[HaystackCases]:
        """Return haystacks of ``length`` tokens with ``cases`` questions in all.

        Each has as large a body as fits. With ``records_of``, tokens, longer haystacks have the
        records and questions of one of that length, and prose between them. ``query_aware`` names
        the question in front as well, so that each has a haystack of its own.

        Raises:
            UserError: the length is too short for the task, or too long.
        """
        least = cases if task.least is None else task.least
        filled = length if records_of is None else min(length, records_of)
        texts = task.aware if query_aware and task.aware else task.texts
        made = []
        for number, draw in enumerate(texts(filled, seed, cases)):
            text = draw(self._most_pieces(task.name, draw, filled, least, task.most))
            if filled < length:
                spaced = partial(space_out, text, seed)
                text = spaced(self._most_pieces(task.name, spaced, length))
            made.append(self._build(text, length, seed, number))
        return made

    def _most_pieces(
        self,
        name: str,
        draw: Callable[[int], HaystackText],
        length: int,
        least: int = 1,
        most: int = sys.maxsize,
    ) -> int:
        """Return how many pieces of a body fit in ``length`` tokens.

        Args:
            draw: number of pieces of the body to a text; a pure function.
            least: smallest number of pieces that makes a case.
            most: how many different pieces there are.

        Raises:
            UserError: not even ``least`` pieces fit, or more than ``most`` would.
        """
        smallest = self._size(draw(least))
        if smallest > length:
            raise UserError(
                f"--lengths has {length}: {name} needs at least {smallest} tokens with this "
                "tokenizer, prompt and number of cases"
            )
        fits, over = least, least + 1
        while over <= most and self._size(draw(over)) <= length:
            fits, over = over, min(2 * over, most + 1)
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if self._size(draw(middle)) <= length else (fits, middle)
        if fits >= most:
            raise UserError(
                f"--lengths has {length}: {name} has no more than {most} pieces, which do not "
                "fill it; take a shorter one"
            )
        return fits

    def build_as_is(self, text: HaystackText) -> tuple[np.ndarray, CaseTail]:
        """Return context and tail of a text with one question, without any padding."""
        (question,) = text.questions
        return self._context(text), self._tail(question)

    def _build(self, text: HaystackText, length: int, seed: int, number: int) -> HaystackCases:
        longest = max(len(self._tail_tokens(question)) for question in text.questions)
        room = length - len(self._context(text))
        size = min(room, -(-longest // _ROUND) * _ROUND)
        tails = [self._tail(question, size) for question in text.questions]
        return HaystackCases(self._context(text, room - size), tails, length, seed, number)

    def _size(self, text: HaystackText) -> int:
        return len(self._context(text)) + max(len(self._tail_tokens(q)) for q in text.questions)

    def _context(self, text: HaystackText, padding: int = 0) -> np.ndarray:
        encode = self.prompt.encode
        pieces = self.prompt.opening()
        for shot in self.shots:
            asked = shot.questions[0]
            texts = (shot.intro, *shot.body, asked.text, asked.cue, *asked.items, "\n\n")
            pieces += self.prompt.encode_all(list(texts))
        if padding:  # the last token is a line break
            filler = encode(prose(padding, encode))[: padding - 1]
            pieces.append(np.append(filler, encode("\n")[:1]))
        pieces += self.prompt.encode_all([text.intro, *text.body])
        return np.concatenate(pieces)

    def _tail_tokens(self, question: Question) -> np.ndarray:
        encode, turn = self.prompt.encode, self.prompt.turn()
        # After a turn the cue begins a text; its space belongs to what came before it.
        cue = question.cue.lstrip() if turn else question.cue
        pieces = [encode(question.text), *turn, encode(cue), *map(encode, question.items)]
        return np.concatenate(pieces)

    def _tail(self, question: Question, size: int = 0) -> CaseTail:
        """Return a tail of at least ``size`` tokens, with blank lines in front.

        A space that is a token of its own before the first part of the answer belongs to the cue:
        a model that would rather write "a" there has not missed the answer.
        """
        tokens = self._tail_tokens(question)
        padding = np.resize(self.prompt.encode("\n"), max(0, size - len(tokens)))
        sizes = [len(self.prompt.encode(item)) for item in question.items]
        for token in self.prompt.encode(question.items[0]):
            if self.prompt.tokenizer.decode([token]).strip():
                break
            sizes[0] -= 1
        return CaseTail(np.concatenate([padding, tokens]), tuple(sizes), question.where)
