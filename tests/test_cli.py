# SPDX-License-Identifier: Apache-2.0
"""The command line: its commands, their flags in ``--help`` and on their pages, how they end."""

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import exit_status

import megatron_cream
from megatron_cream import cli
from megatron_cream.errors import one_line_errors

ROOT = Path(__file__).parents[1]
PAGES = {
    **dict.fromkeys(("preprocess", "merge", "inspect", "render-chat", "retrieval-data"), "data"),
    **dict.fromkeys(("import", "export", "doctor"), "checkpoints"),
    **{"positions": "positions", "plan": "planning", "evaluate": "evaluation"},
    "chat": "evaluation",
    **{"check-install": "install", "extend": "extend", "preflight": "clusters"},
}
FORMATS = ("", "g", ".3f")  # of a number in a help text
SCRIPTS = {
    **{"preprocess": "preprocess_data", "merge": "merge_datasets", "inspect": "inspect_dataset"},
    **{"retrieval-data": "make_retrieval_data", "positions": "plot_positions"},
}


def actions(parser):
    """The flags of a parser and of its sub-commands, with the parser that each belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        elif action.option_strings and action.dest != "help":
            yield parser, action


def test_every_command_with_flags_of_its_own_has_a_page():
    own = {name for name, one in cli.COMMANDS.items() if not one.takes_megatron_flags}
    assert own == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_help_says_what_every_flag_is_and_its_default(name):
    for parser, action in actions(cli.make_parser(name)):
        text = parser._get_formatter()._expand_help(action)
        assert action.help, action.option_strings
        if PAGES[name] == "data" or action.default is not None:
            assert action.required or "default: " in text, action.option_strings
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            said = {f"default: {format(action.default, how)}" for how in FORMATS}
            assert any(words in text for words in said), text


@pytest.mark.parametrize("name", PAGES)
def test_page_has_every_flag(name):
    page = (ROOT / "docs" / f"{PAGES[name]}.md").read_text()
    for _, action in actions(cli.make_parser(name)):
        said = [re.search(rf"{flag}(?![-\w])", page) for flag in action.option_strings]
        assert any(said), f"{action.option_strings} is not in docs/{PAGES[name]}.md"


@pytest.mark.parametrize("name", PAGES)
def test_wrong_flags_are_one_line(name, capsys):
    assert exit_status(cli.main, [name, "--no-such-flag"]) == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys; from megatron_cream import cli; cli.main(['--help']); "
        "assert not {'numpy', 'torch', 'megatron'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1  # it takes 0.1
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert rows == {name: command.summary for name, command in cli.COMMANDS.items()}


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_cream {megatron_cream.__version__}\n"


def test_unknown_command_is_one_line(capsys):
    assert exit_status(cli.main, ["plane"]) == 2
    assert capsys.readouterr().err.startswith("error: COMMAND is plane: it must be one of prepr")


@pytest.mark.parametrize("name", PAGES)
def test_script_of_a_checkout_is_the_command(name, capsys, monkeypatch):
    script = SCRIPTS.get(name, name.replace("-", "_"))
    shared = "convert_checkpoint" if name in ("import", "export") else script
    path = ROOT / "tools" / f"{shared}.py"
    scope = {"__name__": "script"}
    exec(compile(path.read_text(), path, "exec"), scope)
    monkeypatch.setattr(sys, "argv", [str(path)])
    words = [name] if shared == "convert_checkpoint" else []
    assert exit_status(scope["main"], [*words, "--help"]) == 0
    by_script = capsys.readouterr().out
    assert by_script.startswith(f"usage: {path.name} ")
    for spelled in {name, script.replace("_", "-")}:
        assert exit_status(cli.main, [spelled, "--help"]) == 0
        by_command = capsys.readouterr().out
        assert by_command.startswith(f"usage: megatron-cream {name} ")
        assert by_script.split("\n\n", 1)[1] == by_command.split("\n\n", 1)[1]


def test_the_name_of_the_script_that_converts_may_stand_before_its_task(capsys):
    assert exit_status(cli.main, ["convert-checkpoint", "export", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: megatron-cream export ")


def test_megatrons_flags_are_left_to_the_module(monkeypatch):
    from megatron_cream import dry_run

    seen = []
    monkeypatch.setattr(dry_run, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["x"])
    assert cli.main(["dry-run", "--seq-length", "64"]) == 0
    assert seen == [["megatron-cream dry-run", "--seq-length", "64"]]


def test_libraries_get_their_variables_unless_the_user_set_them(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    exit_status(cli.main, ["evaluate", "--help"])
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    exit_status(cli.main, ["evaluate", "--help"])
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "error: interrupted\n"),
        (KeyboardInterrupt("start again"), "error: interrupted; start again\n"),
    ],
)
def test_control_c_is_one_line_and_the_status_of_a_shell(capsys, stop, line):
    def interrupted(_):
        with one_line_errors():
            raise stop

    assert exit_status(interrupted, []) == 130
    assert capsys.readouterr().err == line
