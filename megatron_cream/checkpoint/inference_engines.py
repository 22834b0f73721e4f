# SPDX-License-Identifier: Apache-2.0
"""Which inference engines turn positions as an exported config.json says.

``tests/engines`` runs those that pip has against this table, and ``docs/serving.md`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

YES = "yes"
"""Logits are those that the model was trained with."""

REFUSED = "refused"
"""Loading or conversion ends with an error."""

IGNORED = "ignored"
"""Loads without an error and turns positions otherwise: wrong answers."""

UNKNOWN = "not tried"

ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope", "proportional")
"""Values of rope_type in an export. ``default`` are also ntk and another theta, ``longrope`` also
yarn-pose, trained frequencies and an interpolation on top of another one."""


@dataclass(frozen=True)
class Engine:
    """An inference engine.

    Attributes:
        name: as its own project writes it.
        known: ``run`` by ``tests/engines``, ``run once`` by hand, or ``read in source``.
        reads: what it does with each of ``ROPE_TYPES``, in their order.
        note: what a user must know beside that, or an empty string.
    """

    name: str
    known: str
    reads: tuple[str, ...]
    note: str = ""

    def of(self, rope_type: str) -> str:
        """Return what the engine does with a ``rope_type``."""
        return self.reads[ROPE_TYPES.index(rope_type)]


ENGINES = (
    Engine("transformers 5", "run", (YES, YES, YES, YES, YES, YES)),
    Engine("transformers 4.57", "run", (YES, YES, YES, YES, YES, REFUSED)),
    Engine(
        "vLLM",
        "read in source",
        (YES, YES, YES, YES, YES, REFUSED),
        "with longrope every sequence gets the long list once --max-model-len is more than the "
        "original window; it computes yarn's attention factor itself",
    ),
    Engine(
        "SGLang",
        "read in source",
        (YES, YES, YES, YES, YES, YES),
        "it computes yarn's attention factor itself",
    ),
    Engine(
        "llama.cpp",
        "run",
        (YES, YES, YES, YES, IGNORED, IGNORED),
        "its converter writes down longrope for a Llama without the lists",
    ),
    Engine("CTranslate2", "run", (YES, YES, REFUSED, IGNORED, REFUSED, REFUSED)),
    Engine(
        "ONNX Runtime GenAI",
        "run once",
        (YES, IGNORED, IGNORED, UNKNOWN, UNKNOWN, UNKNOWN),
        "newer versions divide by the factor of linear: compare before you serve",
    ),
    Engine(
        "litgpt",
        "run once",
        (IGNORED,) * 6,
        "takes RoPE from its own table of models by name, and not from config.json",
    ),
)


def by_answer(rope_type: str) -> dict[str, list[str]]:
    """Return the engines by what they do with a ``rope_type``, in the order of ``ENGINES``."""
    found: dict[str, list[str]] = {YES: [], REFUSED: [], IGNORED: [], UNKNOWN: []}
    for engine in ENGINES:
        found[engine.of(rope_type)].append(engine.name)
    return {answer: names for answer, names in found.items() if names}


def sentence(rope_type: str) -> str:
    """Say in one line who reads an export whose config.json has this ``rope_type``."""
    said = {
        YES: "is read by",
        REFUSED: "refused by",
        IGNORED: "silently ignored (wrong answers) by",
        UNKNOWN: "not tried with",
    }
    parts = [f"{said[how]} {', '.join(names)}" for how, names in by_answer(rope_type).items()]
    return f"rope_type {rope_type} {'; '.join(parts)}"
