# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream chat``: ask a model, about a book or paper if one is given.

transformers decodes greedily and streams what it writes. Keys and values of what was read stay for
the next question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_cream.errors import MissingPackageError, UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.options import LARGEST_COUNT, add_flags, validate_count
from megatron_cream.rope.flags import add_rope_flags

EXAMPLES = """
    megatron-cream chat --hf model/ --file book.txt --question 'Who is Long John Silver?'
    megatron-cream chat --hf model/ --file paper.pdf --dual-chunk
    megatron-cream chat --hf model/ --rope-interpolation yarn --rope-factor 4

Without --question it reads a question per line until the end of its input (control-D).
"""

_OURS = {"hf", "dtype", "rope_interpolation", "rope_factor", "dual_chunk", "string", "self_extend"}
_ROOM = 1024  # tokens of questions and answers that SelfExtend's groups have room for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    others = {found.name for found in fields(EvaluationSettings)} - _OURS
    add_flags(parser, EvaluationSettings, others)
    add_rope_flags(parser.add_argument)
    parser.add_argument("--file", help="text or PDF that the model reads before the first question")
    parser.add_argument("--question", nargs="+", help="answer these, and end")
    parser.add_argument(
        "--answer-tokens", type=int, default=256, help="most tokens of an answer (default: 256)"
    )


def run(args: argparse.Namespace) -> None:
    """Answer questions on standard output."""
    given = dict(vars(args))
    file, questions, most = (given.pop(name) for name in ("file", "question", "answer_tokens"))
    validate_count("--answer-tokens", most, 1, LARGEST_COUNT)
    text = read_text(file) if file else None
    if args.hf is None:
        raise UserError("--hf is missing: name the Hugging Face folder of a model")
    conversation = Conversation(EvaluationSettings([], **given), text, most)
    for question in questions or _typed():
        conversation.ask(question)


def _typed() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def read_text(path: str) -> str:
    """Return the text of a file, a PDF by its name.

    Raises:
        OSError, UserError: no such file, or no text in it.
        ImportError: pypdf is not installed.
    """
    if Path(path).suffix.lower() == ".pdf":
        text = "\n".join(_pages(path))
    else:
        try:
            text = Path(path).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--file is {path}: it must be text in UTF-8, or a .pdf") from error
    if not text.strip():
        raise UserError(f"--file is {path}: it has no text (a scan has none, only pictures)")
    return text


def _pages(path: str) -> Iterable[str]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise MissingPackageError(
            f"--file is {path}: to read it needs pypdf: pip install -e '.[pdf]' in a checkout",
            name="pypdf",
        ) from error
    try:
        return [page.extract_text() for page in PdfReader(path).pages]
    except PyPdfError as error:
        raise UserError(f"--file is {path}: pypdf cannot read it ({error})") from error


class Conversation:
    """A model, what it has read, and what was said.

    Args:
        settings: the model, its RoPE and its attention.
        text: what stands before the first question.
        most: tokens of an answer.

    Raises:
        UserError, FileNotFoundError, ImportError: a model that cannot be opened.
    """

    def __init__(self, settings: EvaluationSettings, text: str | None, most: int) -> None:
        settings.lengths = [_ROOM]
        settings.validate()
        from transformers import AutoTokenizer, DynamicCache

        from megatron_cream.attention.methods import attention_choice
        from megatron_cream.evaluation.evaluate import open_model

        assert settings.hf is not None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.hf, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--hf is {settings.hf}: transformers finds no tokenizer") from error
        self.text, self.most, self.messages = text, most, list[dict[str, str]]()
        tokens = len(self.tokenizer(text or "")["input_ids"]) + _ROOM + most
        settings.lengths = [tokens]
        model: Any = open_model(settings)
        self.module = model.module
        if attention_choice(settings) is None:
            self.module.set_attn_implementation("sdpa")
            if tokens - _ROOM > model.window:
                print(
                    f"note: text and answer have {tokens - _ROOM} tokens, {model.name} has a "
                    f"window of {model.window}: --dual-chunk or another RoPE reaches further",
                    file=sys.stderr,
                )
        self.new_cache = DynamicCache
        self.cache = DynamicCache()
        self.read: list[int] = []  # tokens that the cache is of

    def ask(self, question: str) -> str:
        """Stream the answer to standard output, and return it."""
        import torch
        from transformers import TextStreamer

        self.messages.append({"role": "user", "content": question})
        prompt = self._prompt()
        if prompt[: len(self.read)] != self.read:  # a template that rewrites what was said
            self.cache = self.new_cache()
        tokens = torch.tensor([prompt], device=self.module.device)
        written = self.module.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self.cache,
            max_new_tokens=self.most,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )[0].tolist()
        self.read = written[:-1]  # the last token is written, not read
        answer: str = self.tokenizer.decode(written[len(prompt) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _prompt(self) -> list[int]:
        """Return the tokens of all that was said, by the chat template if there is one."""
        before = f"{self.text}\n\n" if self.text else ""
        said = [dict(message) for message in self.messages]
        if self.tokenizer.chat_template is None:
            marks = {"user": "Question: {}\nAnswer:", "assistant": " {}\n\n"}
            whole = before + "".join(marks[m["role"]].format(m["content"].strip()) for m in said)
            return list(self.tokenizer(whole)["input_ids"])
        said[0]["content"] = before + said[0]["content"]
        rendered = self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_dict=True
        )
        return list(rendered["input_ids"])
