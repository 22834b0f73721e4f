# SPDX-License-Identifier: Apache-2.0
"""The commands that README.md and the pages of docs/ print, as a reader meets them.

A comment before each block of commands, which no reader sees, says what becomes of them in the
tests, one line for all commands of the block or a line for each:

    <!-- commands:
    run
    run with 4K 8K 16K as 256 512; with --output as --cpu --output
    run each SLURM_ARRAY_TASK_ID in 0 1 2 3
    parse: needs 8 GPUs
    -->

``run`` runs a command as it is printed on two CPU cores without a network, ``with OLD as NEW``
after that change. ``parse`` only holds flags, paths and variables against the code, for the reason
given. A command in a sentence is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import yaml

from support.launch import ROOT

SHELLS = ("bash", "sh", "shell", "console")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!-- commands:((?:(?!-->).)*)-->\s*\Z", re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAM = re.compile(
    r"(?:\w+=\S+ )*(?:python3?|torchrun(?! \w+ )|docker|pip|pytest|kubectl|sky|sbatch|lm_eval|make"
    r"|megatron-cream|(?:tools|examples)/\S+\.(?:py|sh)|\w+\.sh) \S"
)


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    line: int
    text: str
    language: str = "bash"
    note: str = ""
    in_sentence: bool = False

    @property
    def runs(self) -> bool:
        """Whether it is run, not only parsed."""
        return self.note.startswith("run")

    @property
    def reason(self) -> str:
        """Why it is only parsed."""
        return self.note.removeprefix("parse:").strip()

    @property
    def each(self) -> tuple[str, list[str]] | None:
        """The variable that it is run for, and its values."""
        found = re.search(r"\beach (\w+) in ([^;]+)", self.note)
        return (found[1], found[2].split()) if found else None

    def as_run(self) -> str:
        """Its text after the changes that its note names."""
        text = self.text
        for old, new in re.findall(r"\bwith (.+?) as (.*?)(?:;|$)", self.note):
            assert old in text, f"{self}: {old!r} is not in it"
            text = text.replace(old, new)
        return text

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[str]:
    """README.md and the pages of docs/, in the order of the site's navigation."""
    settings = re.split(r"^(?=\w)", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    nav = next(part for part in settings if part.startswith("nav:"))
    return ["README.md", *(f"docs/{name}" for name in _leaves(yaml.safe_load(nav)["nav"]))]


def _leaves(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [name for part in parts for name in _leaves(part)]


@cache
def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[Command]:
    """All commands of a page, in order."""
    return extract(page, read(page))


def extract(page: str, text: str) -> list[Command]:
    """The commands in a text, those of blocks and those in sentences, in order."""
    found = [command for block in FENCE.finditer(text) for command in _of_block(page, text, block)]
    for match in INLINE.finditer(prose(text)):
        inline = " ".join(match[1].split())
        if PROGRAM.match(inline):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Command(page, line, inline, note="parse: in a sentence", in_sentence=True))
    return sorted(found, key=lambda command: command.line)


def prose(text: str) -> str:
    """``text`` with its blocks and comments blanked, every character at its place."""
    pattern = re.compile(FENCE.pattern + r"|<!--.*?-->", FENCE.flags)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _of_block(page: str, text: str, block: re.Match) -> list[Command]:
    line = text.count("\n", 0, block.start()) + 2
    if block[2] == "python":
        lines = [(line, block[3])]
    elif block[2] in SHELLS:
        lines = logical_lines(block[3], line)
    else:
        return []
    notes = _notes(text[: block.start()])
    assert len(notes) in (1, len(lines)), (
        f"{page}:{line - 1}: {len(notes)} notes for {len(lines)} commands: {notes}. Put a comment "
        "before the block: <!-- commands: run --> or <!-- commands: parse: needs a GPU -->"
    )
    notes = notes * len(lines) if len(notes) == 1 else notes
    return [
        Command(page, number, command, block[2], note)
        for (number, command), note in zip(lines, notes, strict=True)
    ]


def _notes(before: str) -> list[str]:
    note = NOTE.search(before)
    return [line.strip() for line in note[1].splitlines() if line.strip()] if note else []


def logical_lines(block: str, first: int) -> list[tuple[int, str]]:
    """The command lines of a block with the numbers of their first lines, continued ones joined."""
    joined: list[tuple[int, str]] = []
    open_line = False
    for number, line in enumerate(block.splitlines(), first):
        text = line.strip()
        if not open_line and (not text or text.startswith("#")):
            continue
        if open_line:
            joined[-1] = (joined[-1][0], f"{joined[-1][1]} {text.removesuffix(chr(92)).strip()}")
        else:
            joined.append((number, text.removesuffix("\\").strip()))
        open_line = text.endswith("\\")
    return joined
