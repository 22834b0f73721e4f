# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist: what is in them, and the wheel at work where nothing else of ours is."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import megatron_cream
from megatron_cream import cli

pytestmark = pytest.mark.repository


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """The sdist, and the wheel that is made from it; those in the folder DIST, if it is named."""
    if given := os.environ.get("DIST"):
        folder = Path(given).resolve()
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        return sdist, wheel
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(root)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, clean_environment, tmp_path_factory):
    """Runs a command of an environment that has the wheel and no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    bin_folder = folder / "venv" / "bin"

    def run(*words):
        line = [bin_folder / words[0], *words[1:]]
        return subprocess.run(
            line, cwd=folder, env=clean_environment, capture_output=True, text=True, timeout=240
        )

    venv = [sys.executable, "-m", "venv", "--without-pip", bin_folder.parent]
    subprocess.run(venv, check=True)
    pip = [sys.executable, "-m", "pip", "--python", bin_folder / "python", "install", built[1]]
    done = subprocess.run(pip, env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def settings(root):
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg")
    return parser


def test_wheel_holds_every_module_and_the_type_mark(root, built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    modules = {str(path.relative_to(root)) for path in root.glob("megatron_cream/**/*.py")}
    assert modules | {"megatron_cream/py.typed"} <= names
    code = {name for name in names if name.endswith(".py")}
    assert code == modules  # and no tests and tools


def test_sdist_can_be_worked_on(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("Makefile", "requirements.lock", "tests/conftest.py", "examples/demo/demo.py"):
        assert name in names
    for name in ("CHANGELOG.md", "Dockerfile", "docs/positions.md", "tools/find_python.sh"):
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_import_and_version(installed):
    code = "import megatron_cream as m; print(m.__file__, m.__version__)"
    done = installed("python", "-c", code)
    assert done.returncode == 0, done.stderr
    path, version = done.stdout.split()
    assert "/installed" in path and "/venv/" in path
    assert version == megatron_cream.__version__


def test_command_lists_every_command(installed):
    done = installed("megatron-cream", "--help")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert rows == {name: command.summary for name, command in cli.COMMANDS.items()}
    assert "megatron_cream 0." in installed("megatron-cream", "--version").stdout


def test_every_command_is_there(installed):
    code = (
        "import importlib.util; from megatron_cream import cli; "
        "assert all(importlib.util.find_spec(command.module) if command.takes_megatron_flags "
        "else cli.make_parser(name) for name, command in cli.COMMANDS.items())"
    )
    done = installed("python", "-c", code)
    assert done.returncode == 0, done.stderr


def test_command_runs(installed):
    words = ["plan", "llama-2-7b", "--gpus", "8", "--target-length", "32768"]
    done = installed("megatron-cream", *words)
    assert done.returncode == 0, done.stderr
    assert "CREAM to 32768" in done.stdout
    assert "--position-strategy cream" in done.stdout
    module = installed("python", "-m", "megatron_cream", *words)
    assert module.stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["plane"], "COMMAND is plane: it must be one of preprocess"),
        (["plan", "llama-2-7b", "--gpus", "0", "--target-length", "32768"], "--gpus"),
        (["plan", "llama-9", "--gpus", "8", "--target-length", "32768"], "MODEL is 'llama-9'"),
    ],
)
def test_bad_input_is_one_line(installed, words, named):
    done = installed("megatron-cream", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_installed_package_trains(installed):
    done = installed("megatron-cream", "check-install")
    assert done.returncode == 0, done.stderr
    losses = re.search(r"2 training steps on a CPU, losses \[(.+), (.+)\]", done.stdout)
    # 257 tokens, untrained: ln 257 is 5.55.
    assert all(5 < float(loss) < 6 for loss in losses.groups())


def test_extras_that_messages_name_exist(root):
    named = set()
    for path in [*root.glob("megatron_cream/**/*.py"), *root.glob("tools/*.py")]:
        named |= set(re.findall(r"pip install -e '\.\[([\w-]+)\]'", path.read_text()))
    assert named
    assert named <= set(settings(root)["options.extras_require"])
