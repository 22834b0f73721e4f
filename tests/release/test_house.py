# SPDX-License-Identifier: Apache-2.0
"""The tree stays a house to live in: small files and functions, each name once, each explained."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from support.commands import load_file

ROOT = Path(__file__).parents[2]
PACKAGE = sorted(ROOT.glob("megatron_cream/**/*.py"))
CODE = [*PACKAGE, *sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("examples/**/*.py"))]
PICTURE = load_file(ROOT / "docs/hooks/architecture.py")
TREES = {path: ast.parse(path.read_text()) for path in CODE}
MOST_MODULES = 145
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 50
pytestmark = pytest.mark.repository


def name(path):
    return str(path.relative_to(ROOT))


def test_the_package_does_not_grow_rooms_unseen():
    assert 50 < len(PACKAGE) <= MOST_MODULES, "merge what is only read together, or raise the limit"


def test_no_file_name_stands_twice_in_the_package():
    names = Counter(path.name for path in PACKAGE)
    twice = {word for word, count in names.items() if count > 1} - {"__init__.py"}
    assert [name(path) for path in PACKAGE if path.name in twice] == []


def test_no_module_is_long():
    lengths = {name(path): path.read_text().count("\n") for path in CODE}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_long():
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and code_lines(node) > MOST_LINES_OF_FUNCTION:
                found[f"{name(path)}: {node.name}"] = code_lines(node)
    assert found == {}


def code_lines(function):
    """Lines without the docstring; a kernel, which Triton compiles as one, counts as none."""
    if any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return 0
    said = function.body[0] if ast.get_docstring(function) else None
    documentation = said.end_lineno - said.lineno + 1 if said else 0
    return function.end_lineno - function.lineno + 1 - documentation


def test_every_module_says_what_it_is():
    said = {path: (ast.get_docstring(tree) or "").splitlines() for path, tree in TREES.items()}
    assert [name(path) for path, lines in said.items() if not lines] == []
    sentences = {path: lines[0] for path, lines in said.items()}
    assert [name(path) for path, line in sentences.items() if not line[:1].isupper()] == []


def test_the_picture_is_drawn_from_its_script():
    assert PICTURE.IMAGE.read_text() == PICTURE.svg(), "python docs/hooks/architecture.py"


def test_imports_go_down_the_picture():
    """When a module is imported it takes only from rows beneath; late imports are free."""
    boxes = [set(names.split(", ")) for row in PICTURE.ROWS for names in row]
    rows = {
        name: row
        for row, parts in enumerate(PICTURE.ROWS)
        for names in parts
        for name in names.split(", ")
    }
    units = {unit(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE}
    assert units - {"", "__main__"} == set(rows)
    upwards = set()
    for path in PACKAGE:
        own = unit(path.relative_to(ROOT).with_suffix("").parts)
        for other in imported(TREES[path]) & rows.keys() if own in rows else ():
            if rows[other] <= rows[own] and not any({own, other} <= box for box in boxes):
                upwards.add(f"{name(path)} imports {other}")
    assert upwards == set()


def unit(parts):
    """The package or module right under ours that a dotted name belongs to."""
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


def imported(tree):
    """What of ours a module imports when it is imported itself."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            words = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {unit(word.split(".")) for word in words if word.startswith("megatron_cream.")}
    return found


def test_files_that_the_guide_sends_to_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    table = guide.split("| to change | go to |")[1].split("\n\n")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / "megatron_cream" / path).exists()] == []
