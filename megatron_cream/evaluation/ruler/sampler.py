# SPDX-License-Identifier: Apache-2.0
"""What RULER's cases say, and how many pieces of haystack fit a length.

The sentences are the benchmark's interface and equal to NVIDIA/RULER's (see NOTICE). A size is
searched for once, by drawing cases; each draw moves the random state on. Then every case is drawn
at that size, and again with ``step`` pieces fewer while it is too long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_cream.errors import UserError

_TRIES = 100  # RULER tries for ever

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DOCUMENT = "Document {i}:\n{document}"


@dataclass(frozen=True)
class TaskWording:
    """The sentences of a kind of task.

    Attributes:
        template: a case, with ``{context}`` and ``{query}``.
        prefix: how the answer begins; the model goes on from there.
        new_tokens: most tokens that a model writes; a case's length includes them.
    """

    template: str
    prefix: str
    new_tokens: int


NIAH = TaskWording(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all "
    "the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
VARIABLES = TaskWording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: ",
    30,
)
COMMON = TaskWording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT = TaskWording(
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\n"
)
QUESTIONS = TaskWording(
    _ASK + "The following are given documents.\n\n{context}\n\n" + _ASK + "Question: {query}",
    " Answer:",
    32,
)

MODEL_TEMPLATES = {
    "base": "{task_template}",
    "meta-chat": "[INST] {task_template} [/INST]",
    "vicuna-chat": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
    "{task_template} ASSISTANT:",
    "lwm-chat": "You are a helpful assistant. USER: {task_template} ASSISTANT: ",
    "command-r-chat": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{task_template}"
    "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "chatglm-chat": "[gMASK]sop<|user|> \n {task_template}<|assistant|> \n ",
    "RWKV": "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full "
    "response in full details. Please feel free to ask any question and I will always answer it"
    "\n\nUser: {task_template}\n\nAssistant:",
    "Phi3": "<|user|>\n{task_template}<|end|>\n<|assistant|>\n",
    "meta-llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "jamba": "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> {task_template}<|eom|>"
    "<|bom|><|assistant|>",
    "nemotron5-instruct": "<SPECIAL_10>System\n\n<SPECIAL_11>User\n{task_template}\n"
    "<SPECIAL_11>Assistant\n",
}
"""What stands around a task for a base model and for chat models, by RULER's names."""


def fill(template: str, **values: object) -> str:
    """Return a template with its fields filled in; other braces stay as they are."""
    parts, rest = [], template
    while rest:
        found = [(at, name) for name in values if (at := rest.find("{" + name + "}")) >= 0]
        if not found:
            break
        at, name = min(found)
        parts += [rest[:at], str(values[name])]
        rest = rest[at + len(name) + 2 :]
    return "".join([*parts, rest])


@dataclass(frozen=True)
class RulerCase:
    """One question about one haystack.

    Attributes:
        prompt: what the model reads, without the beginning of the answer.
        prefix: how the answer begins; the model reads it after ``prompt`` and goes on.
        answers: strings to be found in what the model writes.
        length: tokens of ``prompt`` and ``prefix``, and those that the model may write.
    """

    prompt: str
    prefix: str
    answers: tuple[str, ...]
    length: int


@dataclass(frozen=True)
class RulerText:
    """A case as text: prompt with the answer's beginning, and the answers."""

    text: str
    answers: list[str]

    def split(self, prefix: str, length: int) -> RulerCase:
        """Return a case; the answer's beginning is found by its first ten characters."""
        at = self.text.rfind(prefix[:10])
        return RulerCase(self.text[:at], self.text[at:], tuple(self.answers), length)


@dataclass
class CaseSampler:
    """Draws the cases of one task at one length.

    Attributes:
        length: tokens of a case, those to generate included.
        count: text to its number of tokens, special ones not added.
        model_template: one of ``MODEL_TEMPLATES``, or another with ``{task_template}``.
        seed: RULER's is 42.
        random, numpy: RULER's two random states.
    """

    length: int
    count: Callable[[str], int]
    model_template: str = "{task_template}"
    seed: int = 42
    random: random.Random = field(init=False)
    numpy: np.random.RandomState = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.numpy = np.random.RandomState(self.seed)

    def shuffle(self, things: list) -> None:
        """Shuffle in place, always in the same way for the same number of things."""
        random.Random(self.seed).shuffle(things)

    def template(self, wording: TaskWording) -> str:
        """Return what a model reads, to be filled in: a task, then the answer's beginning."""
        return fill(self.model_template, task_template=wording.template) + wording.prefix

    def find_size(
        self,
        draw: Callable[[int], RulerText],
        step: int,
        more: int,
        estimate: int | None = None,
    ) -> int:
        """Return the largest number of pieces whose case fits, by bisection; at least ``step``.

        Args:
            more: tokens of a case beside its text.
            estimate: where the bisection begins from above; by default three times as many pieces
                as would fit if all were like those of a case of ``step`` pieces.
        """
        if estimate is None:
            estimate = int((self.length / (self.count(draw(step).text) / step)) * 3)
        low, high, best = step, max(estimate, 2 * step), step
        while low <= high:
            middle = (low + high) // 2
            if self.count(draw(middle).text) + more <= self.length:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def draw_text(
        self,
        task: str,
        draw: Callable[[int], RulerText],
        size: int,
        step: int,
        new_tokens: int,
    ) -> tuple[RulerText, int]:
        """Return a case that fits, and its length.

        Args:
            draw: number of pieces to a case.

        Raises:
            UserError: cases of the fewest pieces do not fit.
        """
        length = 0
        for _ in range(_TRIES):
            text = draw(size)
            length = self.count(text.text) + new_tokens
            if length <= self.length:
                return text, length
            if size > step:
                size -= step
        raise UserError(
            f"--lengths has {self.length}: it is too short for {task}, of which a case needs about "
            f"{length} tokens with this tokenizer and prompt, {new_tokens} to generate included"
        )

    def draw_case(
        self,
        task: str,
        draw: Callable[[int], RulerText],
        size: int,
        step: int,
        wording: TaskWording,
    ) -> RulerCase:
        """Return a case that fits; see ``draw_text``."""
        text, length = self.draw_text(task, draw, size, step, wording.new_tokens)
        return text.split(wording.prefix, length)
