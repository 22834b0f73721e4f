# SPDX-License-Identifier: Apache-2.0
"""Every error message of the package, read from its source: the end of the troubleshooting page.

The page's own rows say cause and fix. This list misses none, and cannot fall behind the code.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARKER = "<!-- every message -->"
GAP = "..."  # stands for a value


def sources() -> list[Path]:
    """Return the Python files of the package and its tools."""
    return sorted([*ROOT.glob("megatron_cream/**/*.py"), *ROOT.glob("tools/*.py")])


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name of the exception, message with ``...`` for values) of each ``raise`` in a file.

    Where a function makes the message, its return values are the messages. One without words of
    its own (an error passed on) is left out.
    """
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for said in chain.from_iterable(map(_said, node.exc.args)):
                if len(said.replace(GAP, "").split()) > 2:
                    yield ast.unparse(node.exc.func), said


def _said(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _returned().get(node.func.id, [])
    return [template(node)]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _returned() -> dict[str, list[str]]:
    """What the functions of the package return, where that is text: by their names."""
    found: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef):
                returns = [part for part in ast.walk(node) if isinstance(part, ast.Return)]
                texts = [template(part.value) for part in returns if part.value is not None]
                found.setdefault(node.name, []).extend(text for text in texts if text != GAP)
    return found


def template(node: ast.expr) -> str:
    """Return a string expression with ``...`` where it has values."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
        case _:
            return GAP


def listing() -> str:
    """Return the messages of all modules as Markdown, a table a module."""
    tables = []
    for path in sources():
        rows = [f"| `{_cell(said)}` | {kind} |" for kind, said in messages(path)]
        if rows:
            title = f"### `{path.relative_to(ROOT)}` {{ data-toc-label='{path.stem}' }}"
            tables.append("\n".join([title, "", "| message | error |", "| --- | --- |", *rows]))
    return "\n\n".join(tables)


def _cell(said: str) -> str:
    return " ".join(said.split()).replace("`", "'").replace("|", "\\|")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the list where the troubleshooting page has its marker; a hook of MkDocs."""
    if page.file.src_path != "troubleshooting.md":
        return markdown
    if MARKER not in markdown:
        raise ValueError(f"{page.file.src_path} has no {MARKER}: the list of messages goes there")
    return markdown.replace(MARKER, listing())


if __name__ == "__main__":
    sys.stdout.write(listing())
