# SPDX-License-Identifier: Apache-2.0
"""Every patch against the installed Megatron, and how a patch comes and goes."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest

from megatron_cream.mcore import patches
from megatron_cream.mcore.patches import MARK, patch, set_built

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_cream"


@pytest.mark.usefixtures("cpu_megatron")
def test_the_installed_release_has_every_symbol():
    found = patches.registered()
    assert {"training_log", "pretrain", "apply_rotary_pos_emb"} <= {each.group for each in found}
    assert patches.validate_all() == f"{len(found)} patches fit the installed megatron-core"
    assert all(each.why.endswith(".") for each in found), "a reason is a sentence"


@pytest.mark.usefixtures("cpu_megatron")
def test_the_page_has_every_patch_and_its_reason():
    page = (ROOT / "docs" / "megatron.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+:[\w.]+)` \| (.+) \|$", page, re.MULTILINE))
    found = [each for each in patches.registered() if each.group != "torch.cuda by the CPU"]
    assert rows == {each.symbols[0]: each.why for each in found}
    assert f"replaces {len(patches.registered()) - len(found)} names of `torch.cuda`" in page


@pytest.mark.usefixtures("cpu_megatron")
def test_what_is_in_place_is_told(monkeypatch):
    from megatron.training import arguments

    assert "torch.cuda by the CPU" in patches.applied()
    (one,) = [each for each in patches.registered() if each.group == "parse_and_validate_args"]
    assert one.group not in patches.applied()
    own = arguments.parse_and_validate_args
    monkeypatch.setattr(arguments, "parse_and_validate_args", own)  # put back behind the test
    one.apply(lambda given, *_: given)
    assert one.group in patches.applied()
    assert arguments.parse_and_validate_args() is own


@pytest.fixture
def library(monkeypatch):
    """A module of somebody's, with a function under two names."""
    module = types.ModuleType("library")
    module.__version__ = "0.20.0"
    module.work = module.alias = lambda x: x
    monkeypatch.setitem(sys.modules, "library", module)
    monkeypatch.setattr(patches, "_patches", {})
    return module


def test_applied_twice_is_once(library):
    own = library.work

    @patch("library:work", "library:alias", why="For a test.", needs=("x",))
    def doubled(own):
        return lambda x: 2 * own(x)

    assert library.work is own and not doubled.in_place
    first = doubled.apply()
    assert doubled.apply() is first is library.work is library.alias
    assert library.work(3) == library.alias(3) == 6 and doubled.in_place


def test_with_settings_the_last_call_wins(library):
    @patch("library:work", why="For a test.")
    def times(own, factor):
        return lambda x: factor * own(x)

    times.apply(2)
    times.apply(5)
    assert library.work(1) == 5


def test_left_as_it_is(library):
    @patch("library:work", why="For a test.")
    def same(own):
        return own

    same.apply()
    assert not hasattr(library.work, MARK)


def test_one_name_has_one_patch(library):
    patch("library:work", why="For a test.")(lambda own: own)
    with pytest.raises(ValueError, match="library:work has a patch"):
        patch("library:work", why="For another.")(lambda own: own)


@pytest.mark.parametrize(
    ("symbol", "needs", "named"),
    [
        ("library:gone", (), "library.gone"),
        ("library:Class.gone", (), "library.Class.gone"),
        ("library:work", ("y",), r"library.work\(y\)"),
        ("library.part:work", (), "library.part.work"),
    ],
)
def test_what_a_release_no_longer_has_is_one_error(library, symbol, needs, named):
    late = patch(symbol, why="For a test.", needs=needs)(lambda own: own)
    message = f"^{named} is gone from library 0.20.0: it may have changed; .* 0.19.2$"
    for attempt in (late.apply, late.current):
        with pytest.raises(ImportError, match=message):
            attempt()


def test_an_attribute_of_a_built_module_must_be_there():
    module = types.SimpleNamespace(factor=1.0)
    set_built(module, "factor", 2.0)
    assert module.factor == 2.0
    with pytest.raises(ImportError, match=r"^types\.SimpleNamespace\.moved is gone from types"):
        set_built(module, "moved", 2.0)


def imported_names(tree):
    """Names that imports of megatron or torch bind in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(each.asname or each.name.split(".")[0], each.name) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [(each.asname or each.name, node.module or "") for each in node.names]
        else:
            continue
        yield from (name for name, module in modules if re.match(r"(megatron|torch)(\.|$)", module))


def replaced(path):
    """Lines of a file that set an attribute of something imported from megatron or torch."""
    tree = ast.parse(path.read_text())
    names = set(imported_names(tree))
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "attribute", ast.Store())]
        for target in targets:
            if (
                isinstance(target, ast.Attribute)
                and re.split(r"\W", ast.unparse(target))[0] in names
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_nothing_is_replaced_but_by_the_registry():
    found = [line for path in PACKAGE.rglob("*.py") for line in replaced(path)]
    # A setting of torch's own, for a process in which it is loaded already.
    assert [re.sub(r":\d+", "", line) for line in found] == ["megatron_cream/mcore/cpu.py"]
    declared = {path.parent.name for path in PACKAGE.rglob("*.py") if "@patch(" in path.read_text()}
    assert declared == {"mcore"}


def imports_megatron(path):
    tree = ast.parse(path.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports = [node.names for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules += [each.name for names in imports for each in names]
    return any(re.match(r"megatron(\.|$)", module) for module in modules)


def test_megatron_is_imported_by_the_door_and_by_what_the_guide_names():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    table = guide.split("| imports megatron | because |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `([\w/]+\.py)` \| .{20,} \|$", table, re.MULTILINE)
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if imports_megatron(path)
    }
    assert sorted(named) == sorted(
        path for path in found if not path.startswith(("mcore/", "extras/"))
    )
