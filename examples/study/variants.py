# SPDX-License-Identifier: Apache-2.0
"""The variants that the study compares, in the order in which they are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUESTIONS = 16
"""Most questions of a task in the retrieval documents of most variants."""


@dataclass(frozen=True)
class Variant:
    """One way to extend the model.

    Attributes:
        name: of the variant, without its seed.
        method: --position-strategy; None for a model that is not trained.
        rope: --rope-interpolation; None for the model as it was.
        flags: more flags of ``megatron_cream.pretrain``.
        retrieval: share of the samples that are retrieval documents.
        seed: of text, order and positions.
        questions: most questions of a task in the retrieval documents.
        answers_only: their loss is on the answers alone.
        tasks: most tasks of a retrieval document.
        targets: its target length in units of the study's, 1 for 32K, 2 for 64K.
        scored_targets: at whose lengths it is scored, in the same units; None for its own.
        full_length: samples and documents have the target's length, as many tokens per step.
    """

    name: str
    method: str | None
    rope: str | None = "yarn"
    flags: tuple[str, ...] = ()
    retrieval: float = 0.15
    seed: int = 1
    questions: int = QUESTIONS
    answers_only: bool = False
    tasks: int = 4
    targets: int = 1
    scored_targets: int | None = None
    full_length: bool = False

    @property
    def documents(self) -> str:
        """Name of the retrieval documents that it reads."""
        parts = [
            *([] if self.questions == QUESTIONS else [str(self.questions)]),
            *(["answers"] if self.answers_only else []),
            *([] if self.tasks == 4 else [f"tasks-{self.tasks}"]),
            *(["full-length"] if self.full_length else []),
        ]
        return "-".join(["retrieval", *parts])

    @property
    def title(self) -> str:
        """Name and seed, a file's name; a model that is not trained has no seed."""
        return self.name if self.method is None else f"{self.name}-seed{self.seed}"


def _seeds(seed: int, *names: str) -> list[Variant]:
    ways = {
        "cream": Variant("cream", "cream", seed=seed),
        "plain": Variant("plain", "full", seed=seed),
        "pose": Variant("pose", "pose", seed=seed),
        "randpos": Variant("randpos", "randpos", seed=seed),
        "cream-plain-0.25": Variant("cream-plain-0.25", "cream", "yarn", PLAIN, seed=seed),
        "cream-relative": Variant("cream-relative", "cream", "yarn", RELATIVE, seed=seed),
        "cope": Variant("cope", "cream", "cope", seed=seed),
        "drope": Variant("drope", "full", "drope", seed=seed),
        "linear": Variant("linear", "cream", "linear", seed=seed),
        "cream-no-retrieval": Variant("cream-no-retrieval", "cream", retrieval=0.0, seed=seed),
        "cream-retrieval-0.30": Variant("cream-retrieval-0.30", "cream", retrieval=0.3, seed=seed),
        "cream-questions-64": Variant("cream-questions-64", "cream", seed=seed, questions=64),
    }
    for share in (0.3, 0.5):
        for method, strategy in {"cream": "cream", "pose": "pose", "plain": "full"}.items():
            name = f"{method}-questions-64-retrieval-{share:.2f}"
            ways[name] = Variant(name, strategy, retrieval=share, seed=seed, questions=64)
    for share in (0.15, 0.3):
        name = f"cream-answers-only-{share:.2f}"
        more = {"retrieval": share, "questions": 64, "answers_only": True}
        ways[name] = Variant(name, "cream", seed=seed, **more)
    for kind, documents in DOCUMENTS.items():
        for way, settings in WAYS.items():
            name = f"{way}-{kind}"
            ways[name] = Variant(name, seed=seed, retrieval=0.5, **documents, **settings)
    for way in FURTHER:
        for targets, length in FURTHER_TARGETS.items():
            name = f"{way}-{length}-answers-only-0.50"
            more = {**DOCUMENTS["answers-only-0.50"], **WAYS[way], "targets": targets}
            ways[name] = Variant(name, seed=seed, retrieval=0.5, **more)
    return [ways[name] for name in names]


PLAIN = ("--plain-share", "0.25")
RELATIVE = ("--cream-sigma-relative", "0.375")
MIXED = ("--mixed-windows", "--plain-share")
DOCUMENTS: dict[str, dict[str, Any]] = {
    "questions-64-retrieval-0.50": {"questions": 64},
    "questions-256-retrieval-0.50": {"questions": 256},
    "answers-only-0.50": {"questions": 64, "answers_only": True},
    "questions-256-answers-only-0.50": {"questions": 256, "answers_only": True},
    "one-task-answers-only-0.50": {"questions": 64, "answers_only": True, "tasks": 1},
}
"""Kinds of retrieval documents, half of the samples each."""
WAYS: dict[str, dict[str, Any]] = {
    "cream": {"method": "cream"},
    "plain": {"method": "full"},
    "pose": {"method": "pose"},
    "cream-relative": {"method": "cream", "flags": RELATIVE},
    "cream-plain-0.25": {"method": "cream", "flags": PLAIN},
    "cream-mixed-0.25": {"method": "cream", "flags": (*MIXED, "0.25")},
    "cream-mixed-0.50": {"method": "cream", "flags": (*MIXED, "0.5")},
    # The factor that YaRN has at 4 times the window, within the old window, too.
    "cream-mixed-0.25-factor": {
        "method": "cream",
        "flags": (*MIXED, "0.25", "--rope-options", "attention_factor=1.1386"),
    },
    "scatter": {"method": "scatter"},
    "scatter-8": {"method": "scatter", "flags": ("--scatter-most-chunks", "8")},
    "scatter-mixed-0.25": {"method": "scatter", "flags": (*MIXED, "0.25")},
    # Extended to twice the length that is asked for, and scored beside those extended to it.
    "scatter-over-2": {"method": "scatter", "targets": 2, "scored_targets": 1},
    "cream-over-2": {"method": "cream", "targets": 2, "scored_targets": 1},
    # What positions that only pretend to be far away are to replace.
    "full-length": {"method": "full", "full_length": True},
    # What extending costs within the old window: the same data, and the model as it was.
    "never-extended": {"method": "full", "rope": "none"},
}
"""Ways to train on one kind or another, under the name WAY-KIND."""
FURTHER, FURTHER_TARGETS = ("scatter", "cream", "plain"), {2: "64K", 4: "128K"}
"""Ways to go beyond 32K, under the name WAY-LENGTH-answers-only-0.50."""
BEYOND = tuple(
    f"{way}-{length}-answers-only-0.50" for length in FURTHER_TARGETS.values() for way in FURTHER
)
ANSWERS = tuple(f"{way}-answers-only-0.50" for way in WAYS)
OTHER_KINDS = tuple(
    f"{way}-{kind}"
    for kind in ("questions-256-retrieval-0.50", *list(DOCUMENTS)[3:])
    for way in ("cream", "scatter")
)
EVERY_TOKEN = tuple(
    f"{way}-questions-64-retrieval-0.50"
    for way in (
        "scatter",
        "cream-relative",
        "cream-mixed-0.25",
        "cream-mixed-0.50",
        "never-extended",
    )
)
MORE_DOCUMENTS = tuple(
    f"{method}-questions-64-retrieval-0.30" for method in ("cream", "pose", "plain")
)
"""The same three positions where the model learns most of what to do near."""

VARIANTS = [
    Variant("before", None, None),
    Variant("yarn-untrained", None),
    *_seeds(1, "cream", "plain", "pose", "cream-plain-0.25", "cream-relative"),
    *_seeds(1, "cream-questions-64"),
    *_seeds(1, *MORE_DOCUMENTS, "cream-questions-64-retrieval-0.50"),
    *_seeds(1, "cream-answers-only-0.15", "cream-answers-only-0.30", *ANSWERS, *OTHER_KINDS),
    *_seeds(1, *EVERY_TOKEN),
    *_seeds(2, *MORE_DOCUMENTS),
    *_seeds(2, "cream", "plain", "pose"),
    *_seeds(2, *ANSWERS),
    *_seeds(1, "cope", "drope", "linear", "cream-no-retrieval", "cream-retrieval-0.30"),
    *_seeds(3, *MORE_DOCUMENTS),
    *_seeds(1, "pose-questions-64-retrieval-0.50", "plain-questions-64-retrieval-0.50"),
    *_seeds(3, "cream", "plain", "pose"),
    *_seeds(3, *ANSWERS),
    *_seeds(1, *BEYOND),
    *_seeds(1, "randpos"),
    *_seeds(2, "cream-plain-0.25", "cream-retrieval-0.30", "cope"),
]
