# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile without docker: its CPU stage's own commands, run in a fresh environment.

What it copies is copied, .dockerignore applied, and what it runs is run, in an empty folder. Only
the system's packages and users are left out, and the dependencies' 6 GB, which ``make setup``
installs for CI itself by the same command, are linked from this environment.
"""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.repository
SYSTEM = ("apt-get", "useradd", "rm", "install")  # only root of an image has these to do


def stages():
    """Instructions (word, rest) of each stage, by its name."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found, current = {}, None
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, name = rest.split(" AS ")
            current = found.setdefault(name, [("FROM", base)])
        elif word:
            current.append((word, rest))
    return found


def ignored(path):
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    parts = path.relative_to(ROOT).parts
    return any(
        any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        if pattern.startswith("**/")
        else fnmatch.fnmatch(parts[0], pattern)
        for pattern in patterns
        if not pattern.startswith("#")
    )


def copy(words, folder):
    """Do a COPY; like docker, a folder's content goes into the target."""
    *given, target = [word for word in shlex.split(words) if not word.startswith("--")]
    (folder / target).mkdir(parents=True, exist_ok=True)
    for source in (ROOT / name for name in given):
        if source.is_file():
            shutil.copy(source, folder / target / source.name)
        else:
            shutil.copytree(source, folder / target, ignore=left_out, dirs_exist_ok=True)


def left_out(folder, names):
    """Which names of a folder .dockerignore leaves out, for shutil.copytree."""
    return [name for name in names if ignored(Path(folder, name))]


def commands(run):
    """The commands of a RUN without those of the system."""
    parts = [part.strip() for part in run.split("&&")]
    return [part for part in parts if shlex.split(part)[0] not in SYSTEM]


@pytest.fixture(scope="module")
def image(tmp_path_factory, clean_environment):
    """A folder after all instructions of the CPU stage, and what its commands printed."""
    folder = tmp_path_factory.mktemp("image")
    printed = []
    for word, rest in stages()["cpu"]:
        if word == "COPY":
            copy(rest, folder)
        if word == "RUN":
            for command in commands(rest):
                done = subprocess.run(
                    ["/bin/sh", "-c", command],
                    cwd=folder,
                    env=clean_environment,
                    capture_output=True,
                    text=True,
                    timeout=400,
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
                printed.append((command, done.stdout))
    return folder, printed


def test_images_are_pinned_and_gpus_are_the_default():
    found = stages()
    assert list(found) == ["cpu", "gpu"]  # without --target the last stage is built
    assert found["cpu"][0][1].startswith("python:3.12.")
    assert found["gpu"][0][1].startswith("nvcr.io/nvidia/pytorch:")
    for (_, base), *_ in found.values():
        assert re.search(r":\d+\.\d+.*", base)


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_image_is_not_roots_and_is_checked(stage):
    instructions = stages()[stage]
    words = [word for word, _ in instructions]
    (user,) = (rest for word, rest in instructions if word == "USER")
    assert user.isdecimal() and int(user) >= 10000
    last = [rest for word, rest in instructions if word == "RUN"][-1]
    assert "check" in last
    assert words.index("USER") < len(words) - 1 - words[::-1].index("RUN")  # as that user


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_a_change_of_the_source_installs_nothing_again(stage):
    instructions = stages()[stage]
    everything = next(i for i, (word, rest) in enumerate(instructions) if rest.endswith(" . ."))
    installs = [
        i
        for i, (word, rest) in enumerate(instructions)
        if word == "RUN" and re.search(r"make setup|pip install|apt-get", rest)
    ]
    assert max(installs) < everything
    before = " ".join(rest for word, rest in instructions[:everything] if word == "COPY").split()
    assert not [name for name in before if name in ("tools", "megatron_cream", "examples")]


def test_cpu_stage_runs_what_the_makefile_is_for():
    instructions = stages()["cpu"]
    runs = [part for word, rest in instructions if word == "RUN" for part in commands(rest)]
    assert runs[-3:] == ["make setup", "make --touch setup", "make check"]
    assert json.loads(instructions[-1][1]) == ["make", "demo"]


def test_commands_of_the_cpu_stage_work_in_a_fresh_environment(image):
    folder, printed = image
    assert (folder / ".venv" / ".ready").is_file()
    assert "2 training steps on a CPU, losses" in dict(printed)["make check"]
    code = "import megatron_cream; print(megatron_cream.__file__)"
    python = folder / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == str(folder / "megatron_cream" / "__init__.py")


def test_demo_would_start_without_another_set_up(image, clean_environment):
    folder, _ = image
    words = ["make", "--dry-run", *json.loads(stages()["cpu"][-1][1])[1:]]
    done = subprocess.run(
        words, cwd=folder, env=clean_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ".venv/bin/python examples/demo/demo.py --rope yarn"


def test_image_has_no_rubbish(image):
    folder, _ = image
    for name in (".git", "runs", "build", ".pytest_cache"):
        assert not (folder / name).exists()
    assert (folder / "examples" / "demo" / "demo.py").is_file()


def test_gpu_stage_takes_its_versions_from_the_lock():
    (run,) = (rest for word, rest in stages()["gpu"] if word == "RUN" and "pip" in rest)
    names = re.search(r"\^\(([^)]+)\)==", run)[1].split("|")
    lock = (ROOT / "requirements.lock").read_text()
    for name in names:
        assert re.search(rf"^{re.escape(name)}==", lock, re.MULTILINE), name
    assert "megatron-core" in names
    # What the base image brings stays the image's.
    assert not {"torch", "triton", "numpy"} & set(names)


def test_dockerfile_is_linted(tmp_path):
    hadolint = Path(sys.executable).with_name("hadolint")
    config = ["--config", str(ROOT / ".hadolint.yaml")]

    def lint(path):
        return subprocess.run([hadolint, *config, path], capture_output=True, text=True)

    done = lint(ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp && pip install numpy\n")
    assert lint(bad).returncode == 1


def make_image(folder, *builders):
    """``make image`` where only these builders are installed; they print their words."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("sh", "make"):
        (tools / name).symlink_to(shutil.which(name))
    for name in builders:
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o755)
    return subprocess.run(
        ["make", "image"], cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("builders", [("buildah", "podman"), ("podman",)])
def test_an_image_is_built_without_a_daemon(builders, tmp_path):
    done = make_image(tmp_path, *builders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [builders[0], "build"]
    assert "--target cpu" in done.stdout and done.stdout.split()[-1] == "."


def test_no_builder_is_one_line(tmp_path):
    done = make_image(tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "error: make image needs buildah or podman"
