# SPDX-License-Identifier: Apache-2.0
"""Each flag of the data tools: its default in ``--help``, and the flag in docs/data.md."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from support.commands import exit_status

from megatron_cream.corpus import command_line

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
TOOLS = ("preprocess_data", "merge_datasets", "inspect_dataset", "render_chat")


class Parsed(BaseException):
    pass


def parser_of(name):
    """The parser of a tool, as the tool has made it."""
    found = []

    def parse_args(self, argv=None):
        found.append(self)
        raise Parsed

    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line.Parser, "parse_args", parse_args)
        patch.setitem(sys.modules, name, tool)  # a dataclass looks itself up there
        spec.loader.exec_module(tool)
        with pytest.raises(Parsed):
            tool.main([])
    return found[0]


def flags(parser):
    for action in parser._actions:
        if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS:
            yield action.option_strings[-1], action


@pytest.mark.parametrize("name", [*TOOLS, "benchmark_preprocess"])
def test_help_says_the_default_of_every_flag(name):
    parser = parser_of(name)
    formatter = parser._get_formatter()
    for flag, action in flags(parser):
        text = formatter._expand_help(action)
        assert action.required or "default: " in text, flag
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert f"(default: {action.default})" in text, flag


@pytest.mark.parametrize("name", TOOLS)
def test_every_flag_is_documented(name):
    wanted = [flag for flag, _ in flags(parser_of(name))]
    assert [flag for flag in wanted if not re.search(rf"{flag}(?![-\w])", PAGE)] == []


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("argv", [[], ["--no-such-flag"], ["--input"]])
def test_a_wrong_command_line_is_one_line(name, capsys, argv):
    assert exit_status(parser_of(name).parse_args, argv) == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
