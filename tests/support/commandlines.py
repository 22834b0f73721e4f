# SPDX-License-Identifier: Apache-2.0
"""Holds a documented command line against what it names, without running it."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import shlex
from collections.abc import Callable
from functools import cache

from megatron_cream import cli
from support.launch import ROOT
from support.parsers import command_parser, need, parse, pretrain_parser, tool_parser

PLACEHOLDER = re.compile(r"<[a-zA-Z][^<>]*>|(?<!\S)\S*\.\.\.(?!\S)")
OTHERS = ("git", "lm_eval", "pre-commit")  # programs that are not ours, with flags of their own
CLONES = ("Megatron-LM/", "eval.py", "script.py")  # scripts of other repositories
LIBRARIES = ("pre-commit", "nvidia-resiliency-ext")  # named in pages, and in no extra


def check(text: str, elided: bool = False) -> None:
    """Raise WrongCommandError if a command line names a flag, path or variable that is not there.

    ``elided`` means that flags are left out, as a placeholder in ``text`` does: none is required.
    """
    whole = PLACEHOLDER.sub(" ", text)
    words = shlex.shlex(whole, posix=True, punctuation_chars="&|;")
    words.whitespace_split, words.commenters = True, "#"
    simple: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;"):
            simple.append([])
        else:
            simple[-1].append(word)
    for parts in simple:
        check_simple(parts, elided=elided or whole != text)


def check_simple(words: list[str], elided: bool = False) -> None:
    """Check one command of a line; ``elided`` means that the page leaves flags out."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        check_variable(words[0].partition("=")[0])
        words = words[1:]
    if not words:
        return
    program, rest = words[0], [re.sub(r"\$\w+", "1", word) for word in words[1:]]
    if program.startswith("--"):
        parse(pretrain_parser(), [program, *rest], elided=True)
    elif program in PROGRAMS:
        PROGRAMS[program](rest, elided)
    elif program not in OTHERS:
        check_script(program, rest, elided)


def check_variable(name: str) -> None:
    """A variable must be read by a script, the Makefile or the code."""
    need(re.search(rf"\b{name}\b", _readers()), f"nothing reads the variable {name}")


@cache
def _readers() -> str:
    scripts = [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.yaml"), ROOT / "Makefile"]
    texts = [path.read_text() for path in [*scripts, *ROOT.glob("tools/*.sh")]]
    folders = ("examples", "megatron_cream", "tests", "tools")
    code = (path.read_text() for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))
    texts += ["\n".join(line for line in text.splitlines() if "environ" in line) for text in code]
    return "\n".join(re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE) for text in texts)


def check_python(words: list[str], elided: bool) -> None:
    """Check ``python -m MODULE ...`` or ``python SCRIPT ...``."""
    if words[:1] == ["-m"]:
        check_module(words[1], words[2:], elided)
    elif words:
        check_script(words[0], words[1:], elided)


def check_module(module: str, words: list[str], elided: bool) -> None:
    """Check a module's flags; one of another package must only be there."""
    if module in ("megatron_cream.pretrain", "megatron_cream.dry_run"):
        parse(pretrain_parser(), words, elided)
    elif module == "megatron_cream.launch":
        parse(pretrain_parser(), words[1:], elided=True)
    elif module == "megatron_cream":
        check_tool(words, elided)
    else:
        need(importlib.util.find_spec(module), f"there is no module {module}")


def check_tool(words: list[str], elided: bool) -> None:
    """Check ``megatron-cream COMMAND ...``."""
    if not words or words[0].startswith("-"):
        return
    name = cli.SCRIPT_NAMES.get(words[0], words[0])
    need(name in cli.COMMANDS, f"there is no command {words[0]}")
    if cli.COMMANDS[name].takes_megatron_flags:
        check_module(cli.COMMANDS[name].module, words[1:], elided)
    else:
        parse(command_parser(name), words[1:], elided)


def check_script(name: str, words: list[str], elided: bool) -> None:
    """Check a script of this repository; one in a clone beside it must say so by its folder."""
    if name.startswith(CLONES):
        return
    found = [ROOT / name] if "/" in name else [*ROOT.glob(f"[et]*/**/{name}")]
    need(len(found) == 1 and found[0].is_file(), f"there is no {name}")
    path = found[0]
    if path.parent == ROOT / "tools" and path.stem == "convert_checkpoint":
        check_tool(words, elided)
    elif path.parent == ROOT / "tools" and path.suffix == ".py":
        parse(tool_parser(path), words, elided)
    elif path.suffix == ".sh":
        need(os.access(path, os.X_OK) or "slurm" in name, f"{name} cannot be started")
        own = [word for word in words if word.startswith("--") and word in path.read_text()]
        own += ["--dry-run"] if "common.sh" in path.read_text() else []
        flags = [word for word in words if word not in own]
        if flags and flags[0].startswith("-"):
            parse(pretrain_parser(), flags, elided=True)
    else:
        flags = [word for word in words if word.startswith("--")]
        need(all(flag in path.read_text() for flag in flags), f"{name} has not all of {flags}")


def check_torchrun(words: list[str], elided: bool) -> None:
    """Check torchrun's own flags, and what it starts."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    if not [word for word in words if not word.startswith("-")]:
        return parse(parser, words, elided=True)
    args = parse(parser, words, elided)
    check_python(
        [*(["-m"] if args.module else []), args.training_script, *args.training_script_args], elided
    )


def check_make(words: list[str], elided: bool) -> None:
    """Check targets and variables of make."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            check_variable(name)
        else:
            need(re.search(rf"^{name}:", makefile, re.MULTILINE), f"make has no target {name}")


def check_pip(words: list[str], elided: bool) -> None:
    """What is installed must be this checkout with extras that it has, or a requirement of ours."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = dict(config["options.extras_require"])
    known = config["options"]["install_requires"] + "\n".join([*extras.values(), *LIBRARIES])
    for word in words[1:]:
        target, _, chosen = word.rstrip("]").partition("[")
        if target == ".":
            missing = {name for name in chosen.split(",") if name} - set(extras)
            need(not missing, f"setup.cfg has no extra {missing}")
        elif not word.startswith("-"):
            need(re.match(r"[\w.-]+", target)[0] in known, f"{target} is no requirement of ours")


def check_docker(words: list[str], elided: bool) -> None:
    """A target must be a stage of the Dockerfile, what is run must be what a page builds."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    if words[0] == "build" and "--target" in words:
        stage = words[words.index("--target") + 1]
        need(re.search(rf"^FROM .* AS {stage}$", dockerfile, re.MULTILINE), f"no stage {stage}")
    images = [word for word in words if word.startswith("megatron_cream")]
    unnamed = words[0] == "build" and "-t" not in words
    need(
        unnamed or len(images) == 1 and images[0] in ("megatron_cream", "megatron_cream:cpu"),
        f"{images}",
    )


def check_files(words: list[str], elided: bool) -> None:
    """Launchers of clusters: files must exist, variables must be read by some script."""
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable and not name.startswith("-"):
            check_variable(name)
        path = value if is_variable else name
        need(not path.startswith("examples/") or (ROOT / path).is_file(), f"there is no {path}")


def check_pytest(words: list[str], elided: bool) -> None:
    """Paths of tests must exist."""
    for word in words:
        need(word.startswith("-") or (ROOT / word).exists(), f"there is no {word}")


def check_export(words: list[str], elided: bool) -> None:
    """A variable that is exported must be read."""
    for word in words:
        check_variable(word.partition("=")[0])


PROGRAMS: dict[str, Callable[[list[str], bool], None]] = {
    **{"python": check_python, "torchrun": check_torchrun, "make": check_make, "pip": check_pip},
    **{"docker": check_docker, "sbatch": check_files, "sky": check_files, "kubectl": check_files},
    **{"sed": check_files},
    **{"pytest": check_pytest, "export": check_export, "megatron-cream": check_tool},
}


def check_code(text: str) -> None:
    """Python of a page must compile, and the names that it imports must exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                need(hasattr(module, alias.name), f"{node.module} has no {alias.name}")
