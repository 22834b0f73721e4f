# SPDX-License-Identifier: Apache-2.0
"""The public names: importing the package stays light, and each says what a caller must know."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_cream
from megatron_cream.positions import STRATEGIES
from megatron_cream.rope import SCALINGS

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
FUNCTIONS = [name for name in megatron_cream.__all__ if name[0].islower()]
TENSORS = ("make_strategy", "make_scaling", "coverage", "dual_chunk_attention", "load_model")
PAPERS = {
    "dual_chunk_attention": "arXiv:2402.17463",
    "string_attention": "arXiv:2410.18745",
    "self_extend_attention": "arXiv:2401.01325",
}


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, megatron_cream; dir(megatron_cream); megatron_cream.__version__\n"
        "print(*[n for n in ('torch', 'numpy', 'megatron', 'transformers') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_positions_and_angles_come_without_torch():
    code = (
        "import sys; from megatron_cream import make_strategy, make_scaling, ExtensionConfig\n"
        "print(*[n for n in ('torch', 'megatron') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_names_are_listed_and_others_are_not_there():
    assert sorted(megatron_cream.__all__) == megatron_cream.__all__
    assert set(megatron_cream.__all__) <= set(dir(megatron_cream))
    assert set(megatron_cream._MODULE_OF) == set(megatron_cream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'propos'"):
        megatron_cream.propos  # noqa: B018


@pytest.mark.parametrize("name", megatron_cream.__all__)
def test_each_is_on_the_page(name):
    assert re.search(rf"^::: megatron_cream\.(\w+\.)*{name}$", API, re.MULTILINE), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_says_what_it_takes_returns_and_raises(name):
    function = getattr(megatron_cream, name)
    text = inspect.getdoc(function)
    assert "Args:" in text and "Returns:" in text and "Raises:" in text, name
    first = next(iter(inspect.signature(function).parameters))
    assert re.search(rf"^ +(\w+, )*{first}\b.*:", text.split("Args:")[1], re.MULTILINE)
    assert re.search(r"\b(tokens|seconds|bytes|radians|GiB)\b|\[b, s", text), f"{name}: no unit"


@pytest.mark.parametrize("name", TENSORS)
def test_arrays_have_their_shapes(name):
    assert re.search(r"``\[[^\]]+\]``", inspect.getdoc(getattr(megatron_cream, name)))


@pytest.mark.parametrize(("name", "paper"), PAPERS.items())
def test_formulas_have_their_source(name, paper):
    assert paper in inspect.getdoc(getattr(megatron_cream, name))


@pytest.mark.parametrize("cls", [*STRATEGIES.values(), *SCALINGS.values()])
def test_every_strategy_and_interpolation_explains_itself_and_its_options(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    options = cls.declared() if hasattr(cls, "declared") else cls.OPTIONS
    assert all(option.help and "None" not in option.full_help for option in options.values())
