# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, and its troubleshooting page quotes messages that exist."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support.commands import load_file

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.repository
PAGE = ROOT / "docs" / "troubleshooting.md"
THEIRS = ("megatron/core/datasets/utils.py", "megatron/training/arguments.py")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def load_hook(name):
    return load_file(ROOT / "docs" / "hooks" / f"{name}.py")


@pytest.fixture(scope="module")
def hook():
    return load_hook("error_messages")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_column_of_a_table_has_a_name(page):
    tables = re.findall(r"^(\|.*\|)\n\|[-:| ]+\|$", page.read_text(), re.MULTILINE)
    heads = [[cell.strip() for cell in head.strip("|").split("|")] for head in tables]
    assert [head for head in heads if not all(head)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_command_lines_fit_the_page(page):
    blocks = re.findall(
        r"^```(?:bash|python)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert [line for block in blocks for line in block.splitlines() if len(line) > 103] == []


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        (
            "ssh://git@host.example.org:22/group/sub/name.git",
            "https://host.example.org/group/sub/name",
        ),
        ("https://github.com/owner/name", "https://github.com/owner/name"),
        ("https://user:secret@github.com/owner/name.git/", "https://github.com/owner/name"),
        ("/srv/git/name.git", None),
        ("../name", None),
        ("", None),
    ],
)
def test_link_to_the_repository_is_that_of_the_clone(remote, address):
    assert load_hook("repository").web_address(remote) == address


def quoted(title):
    """What the rows under a heading of the page quote."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def headings():
    found = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    return [
        title
        for title in found
        if title not in ("Messages of Megatron and torch", "No message, but wrong")
    ][:-1]


def fragments(text):
    return [part.strip() for part in text.split("...") if part.strip()]


def says(text, phrase):
    """Whether ``text`` has the parts of ``phrase`` in order."""
    at = 0
    for part in fragments(phrase):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.fixture(scope="module")
def texts(hook):
    """Every text in the package with ``...`` for values, and that of the set-up's script."""
    found = [(ROOT / "tools" / "find_python.sh").read_text().replace('" \\\n  "', " ")]
    for path in hook.sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append(" ".join(hook.template(node).split()))
    return found


@pytest.mark.parametrize("title", headings())
def test_quoted_messages_are_in_the_code(texts, title):
    phrases = quoted(title)
    assert len(phrases) >= 3
    missing = [phrase for phrase in phrases if not any(says(text, phrase) for text in texts)]
    assert missing == []


def test_quotes_tell_messages_apart():
    phrases = [phrase for title in headings() for phrase in quoted(title)]
    assert len(phrases) > 80
    assert len(set(phrases)) == len(phrases)
    assert [phrase for phrase in phrases if len("".join(fragments(phrase))) < 12] == []


def test_megatrons_own_messages_are_megatrons():
    site = Path(distribution("megatron-core").locate_file("."))
    theirs = "".join((site / path).read_text() for path in THEIRS)
    ours = [phrase for phrase in quoted("Messages of Megatron and torch") if phrase in theirs]
    assert len(ours) == 2


def test_every_raise_with_words_is_listed(hook):
    listing = hook.listing()
    for path in hook.sources():
        tree = ast.parse(path.read_text())
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
        for call in raised:
            words = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
            longest = max((word for word in words if isinstance(word, str)), key=len, default="")
            plain = " ".join(longest.split())
            if isinstance(call, ast.Call) and len(plain.split()) > 3 and "`" not in plain:
                assert plain.replace("|", "\\|") in listing, f"{path}: {plain}"


def test_list_of_messages_has_those_that_functions_make(hook):
    listing = hook.listing()
    assert "has no document for the ... split: a sample takes at least ... tokens" in listing
    assert "`...`" not in listing


def test_hook_needs_its_marker(hook):
    page = type("Page", (), {"file": type("File", (), {"src_path": "troubleshooting.md"})})
    assert "UserError" in hook.on_page_markdown(f"a {hook.MARKER} b", page)
    with pytest.raises(ValueError, match="every message"):
        hook.on_page_markdown("no marker", page)


def build(config, output):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(output)]
    return subprocess.run(
        [*command, "-f", str(config)],
        cwd=ROOT,
        env={**os.environ, "REPOSITORY_URL": "git@github.com:owner/name.git"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_site_builds_without_a_warning(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "megatron_cream.positions.make_strategy" in api
    assert "one of <code>" in api or "<code>cream</code>" in api  # docstrings, not only names
    messages = (tmp_path / "site" / "troubleshooting" / "index.html").read_text()
    assert "a sample takes at least" in messages
    assert not list((tmp_path / "site").rglob("*.py"))
    start = (tmp_path / "site" / "index.html").read_text()
    assert 'href="https://github.com/owner/name"' in start
    assert "megatron-cream" in start and "SmolLM2-135M-32K" in start
    assert (tmp_path / "site" / "install" / "index.html").is_file()
    seen = re.sub(r"(?s)<!--.*?-->", "", start)
    index = (tmp_path / "site" / "search" / "search_index.json").read_text()
    assert "parse:" not in seen and "parse:" not in index  # notes to the tests of commands


def test_a_broken_link_ends_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[to nowhere](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    kept = settings.partition("validation:")
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: a\nstrict: true\n" + kept[1] + kept[2])
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stdout + done.stderr
