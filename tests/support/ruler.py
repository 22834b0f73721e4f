# SPDX-License-Identifier: Apache-2.0
"""Invented essays, questions and a tokenizer that RULER's scripts and ours are compared on."""

import hashlib
import json
import re

from megatron_cream.evaluation.task_texts import sentences

CHAT = "[INST] {task_template} [/INST]"


def tokens(text: str) -> list[str]:
    """Return pieces of up to four letters, other characters one by one."""
    return re.findall(r"\w{1,4}|\W", text)


def count(text: str) -> int:
    """Return the number of tokens."""
    return len(tokens(text))


def cut(text: str) -> list[str]:
    """Return sentences that end in a full stop."""
    return re.split(r"(?<=\.) ", text)


def essay() -> str:
    """Return invented prose, shorter than the longest case."""
    return "".join(sentences(5, 90)).strip()


def squad() -> dict:
    """Return questions in SQuAD's form; one has no answer."""
    articles = []
    for i in range(12):
        parts = []
        for j in range(3):
            text = "".join(sentences(100 * i + j, 3)).strip()
            qas = [
                {
                    "question": f"Who is {i} of {j}?",
                    "is_impossible": (i, j) == (0, 1),
                    "answers": [{"text": text.split()[4]}, {"text": text.split()[3]}],
                }
            ]
            parts.append({"context": text, "qas": qas})
        articles.append({"title": str(i), "paragraphs": parts})
    return {"data": articles}


def hotpot() -> list[dict]:
    """Return questions in HotpotQA's form, each of ten documents."""
    found = []
    for i in range(8):
        context = [[f"Title {i} {j}", list(sentences(10 * i + j, 2))] for j in range(10)]
        found.append({"question": f"What is {i}?", "answer": f"answer {i}", "context": context})
    return found


def fingerprint(prompt: str, prefix: str, answers: list[str], length: int) -> str:
    """Return a short hash of a case."""
    return hashlib.sha256(json.dumps([prompt, prefix, answers, length]).encode()).hexdigest()[:16]
