# SPDX-License-Identifier: Apache-2.0
"""Which engine reads which export: the page says what the code says, and exports repeat it."""

import re
from pathlib import Path

import pytest

from megatron_cream.checkpoint.hf_writer import (
    ENGINES,
    ROPE_TYPES,
    describe_engines,
    engines_by_answer,
)
from megatron_cream.rope import SCALINGS, make_scaling

UNTRAINED = [name for name, cls in SCALINGS.items() if not cls.trained_by]
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_page_has_the_table():
    rows = re.findall(r"^\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows[0].split(" | ") == ["engine", "known by", *ROPE_TYPES]
    expected = [" | ".join([e.name, e.known, *e.reads]) for e in ENGINES]
    assert rows[2 : 2 + len(ENGINES)] == expected


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_export_has_a_column(name):
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if name == "longrope" else {}
    scaling = make_scaling(name, dim=16, factor=2.0, original_length=64, **lists)
    kind = scaling.to_hf()["rope_type"]
    if name != "dynamic":  # it is never trained with, so never exported
        assert kind in ROPE_TYPES


def test_sentence_names_every_engine_once_and_says_what_it_does():
    for kind in ROPE_TYPES:
        said = describe_engines(kind)
        assert "\n" not in said
        for engine in ENGINES:
            assert len(re.findall(re.escape(engine.name), said)) == 1
        parts = said.split("; ")
        for part, names in zip(parts, engines_by_answer(kind).values(), strict=True):
            assert part.endswith(", ".join(names))
    assert "silently ignored (wrong answers) by CTranslate2, litgpt" in describe_engines("llama3")
    assert "refused by CTranslate2" in describe_engines("yarn")
