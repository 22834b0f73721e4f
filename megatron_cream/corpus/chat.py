# SPDX-License-Identifier: Apache-2.0
"""Turns conversations into plain documents, by the chat template of a tokenizer.

A document is the text that the chat model sees, special tokens written out; tokenizing turns these
into their ids. A run trains on all of it, or on what the assistant says: a conversation is then
rendered up to each of its words and behind them, so that a template needs no marks for this.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cream import ownership
from megatron_cream.errors import UserError

EXAMPLES = """
    megatron-cream render-chat --input sharegpt.jsonl --tokenizer-model Llama-2-7b-chat-hf \\
        --output conversations.jsonl
    megatron-cream preprocess --input conversations.jsonl --min-tokens 4096 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Llama-2-7b-chat-hf \\
        --output-prefix conversations

One conversation per line: {"messages": [{"role", "content"}, ...]}, or ShareGPT's
{"conversations": [{"from", "value"}, ...]}. All of a document is trained, the user's words too,
unless --assistant-only is given here and --mask-key trained to preprocess. See docs/data.md.
"""

_KIND = "conversations"  # in the mark of the folder of an unfinished output

# Who speaks, in the ShareGPT format's words.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron-cream render-chat``."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL")
    add("--tokenizer-model", required=True, metavar="FOLDER", help="with the chat template")
    add("--output", required=True, metavar="FILE", help="JSONL with one text per line")
    only = "also write which characters the assistant says, as trained"
    add("--assistant-only", action="store_true", help=only)
    add("--on-error", choices=("fail", "skip"), default="fail", help="at a bad conversation")
    add("--overwrite", action="store_true", help="replace --output")


def run(args: argparse.Namespace) -> None:
    """Render the conversations that the command line names, and say how many there are."""
    skip = args.on_error == "skip"
    written, skipped = render_files(
        args.input,
        args.output,
        args.tokenizer_model,
        skip=skip,
        overwrite=args.overwrite,
        assistant_only=args.assistant_only,
    )
    print(f"{args.output}: {written} conversations, {skipped} skipped")


def messages_of(record: Any) -> list[dict[str, str]]:
    """Return the messages of a conversation as ``role`` and ``content``.

    Args:
        record: ``{"messages": [{"role", "content"}, ...]}``, or ShareGPT's
            ``{"conversations": [{"from", "value"}, ...]}``.

    Raises:
        UserError: it is neither, or somebody unknown speaks.
    """
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        messages, who, what = record["messages"], "role", "content"
    elif isinstance(record, dict) and isinstance(record.get("conversations"), list):
        messages, who, what = record["conversations"], "from", "value"
    else:
        raise UserError("it must have a list, messages or conversations")
    if not messages:
        raise UserError("its list of messages is empty")
    return [_message(message, who, what) for message in messages]


def _message(message: Any, who: str, what: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get(what), str):
        raise UserError(f"each message must have a text, {what}")
    role = message.get(who)
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{who} of a message is {role!r}: it must be one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": message[what]}


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer.

    Raises:
        UserError: the tokenizer has none.
        OSError: there is no tokenizer.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"--tokenizer-model is {folder}: there is no such folder; it must be that of a "
                "Hugging Face tokenizer"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # the library raises of any type for what it cannot read
            raise UserError(
                f"--tokenizer-model is {folder}: its tokenizer cannot be loaded ({error})"
            ) from error
        if not self.tokenizer.chat_template:
            raise UserError(
                f"--tokenizer-model is {folder}: it must have a chat template, as the tokenizers "
                "of chat models do"
            )

    def render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            messages: all of it, or its beginning.
            prompt: whether the assistant is asked to go on.

        Raises:
            UserError: the template refuses it, two users in a row say.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError as error:
            raise UserError(f"the chat template does not take it: {error}") from None

    def render_trained(self, messages: list[dict[str, str]]) -> tuple[str, list[list[int]]]:
        """Return the text of a whole conversation, and where the assistant speaks in it.

        Each stretch is from the first character that the assistant is to write to the last that
        the template puts behind its words.

        Raises:
            UserError: the template refuses it, or what it writes of the beginning of a conversation
                is not how it begins the whole, so that nothing says where words stand.
        """
        whole, trained = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], prompt=True)
            behind = self.render(messages[: i + 1])
            said = behind[len(before) :]
            if not (behind.startswith(before) and whole.startswith(behind)):
                raise UserError(f"{_INEXACT} (message {i + 1} changes what stands before it)")
            if not said.lstrip().startswith(message["content"].strip()) or not said:
                raise UserError(f"{_INEXACT} (it puts something in front of message {i + 1})")
            trained.append([len(before), len(behind)])
        if not trained:
            raise UserError("the assistant says nothing in it, needs one such message")
        return whole, trained


_INEXACT = "--assistant-only: the chat template does not say exactly where the assistant speaks"


def read_conversations(
    lines: Iterable[bytes],
    template: ChatTemplate,
    name: str,
    skip: bool,
    assistant_only: bool = False,
) -> Iterator[dict[str, Any] | None]:
    """Yield the document of each line of a JSONL file, None for one that is skipped.

    A document is an object with its ``text`` and, for the assistant alone, ``trained``.

    Args:
        lines: UTF-8.
        template: of the tokenizer.
        name: of the file, for errors.
        skip: go on at a conversation that cannot be rendered.
        assistant_only: whether to say where the assistant speaks.

    Raises:
        UserError: naming the file and the line.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = messages_of(json.loads(line))
            if assistant_only:
                text, trained = template.render_trained(messages)
                document: dict[str, Any] = {"text": text, "trained": trained}
            else:
                document = {"text": template.render(messages)}
            document["text"].encode()  # half a surrogate pair cannot be written
            yield document
        except (ValueError, RecursionError) as error:
            if not skip:
                raise UserError(f"{name}, line {number}: {error}; --on-error skip") from None
            yield None


def render_files(
    inputs: list[str],
    output: str,
    folder: str,
    skip: bool,
    overwrite: bool = False,
    assistant_only: bool = False,
) -> tuple[int, int]:
    """Write ``output``, one ``{"text": ...}`` per line; return conversations written and skipped.

    With ``assistant_only`` each has ``trained``, too: pairs of characters, where it speaks.

    Raises:
        UserError: a conversation that cannot be rendered, none that can, or an output that is
            there already or is an input; nothing is kept.
        OSError: a file that cannot be read or written.
    """
    path, written, skipped = Path(output), 0, 0
    _validate_output(path, inputs, overwrite)
    template = ChatTemplate(folder)
    with _unfinished(path) as partial:
        with open(partial, "x", encoding="utf-8") as out:
            for name in inputs:
                with open(name, "rb") as lines:
                    found = read_conversations(lines, template, name, skip, assistant_only)
                    for document in found:
                        if document is None:
                            skipped += 1
                            continue
                        written += 1
                        out.write(json.dumps(document, ensure_ascii=False) + "\n")
        if not written:
            raise UserError(f"--input: {skipped} conversations, and none that can be rendered")
        _validate_output(path, inputs, overwrite)
        os.replace(partial, path)
    return written, skipped


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Give a file in a folder that is marked as ours, where a killed process's is removed first."""
    place = output.with_name(output.name + ".parts")
    held = ownership.lock(place, _KIND, f"--output is {output}", "another file")
    try:
        ownership.empty(place, _KIND)
        yield place / "text"
    finally:
        ownership.remove(place, _KIND)
        os.close(held)


def _validate_output(path: Path, inputs: list[str], overwrite: bool) -> None:
    for name in inputs:
        if os.path.realpath(name) == os.path.realpath(path):
            raise UserError(f"--output is {path}: it is an input; it must be another file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output is {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"--output is {path}: it is a folder; it must be a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--output is {path}: it exists; give another name, or --overwrite")
