# SPDX-License-Identifier: Apache-2.0
"""Has RULER's sentences: what a model reads around a haystack, and how its answer begins.

They are the benchmark's interface and equal to NVIDIA/RULER's (see NOTICE).
"""

from __future__ import annotations

from dataclasses import dataclass

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


def around(wording: TaskWording, model_template: str) -> str:
    """Return what a model reads: the task in the model's template, then the answer's beginning."""
    return fill(model_template, task_template=wording.template) + wording.prefix
