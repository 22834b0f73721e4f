# SPDX-License-Identifier: Apache-2.0
"""Versions, changelog, templates and hooks say the same as the code they are about."""

import configparser
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import megatron_cream

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
pytestmark = pytest.mark.repository
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def requirement():
    """Which releases of megatron-core setup.cfg asks for."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return re.search(r"megatron-core\[training\](\S+)", parser["options"]["install_requires"])[1]


def test_newest_section_of_the_changelog_is_unreleased_or_this_version():
    sections = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert sections[0] == "Unreleased"
    released = [section for section in sections if section != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", section) for section in released)
    assert not released or released[0] == megatron_cream.__version__


def test_changelog_says_which_megatron_core():
    minor = megatron_cream.__version__.rpartition(".")[0]
    (row,) = re.findall(rf"^\| {re.escape(minor)} \| (\S+) \| (\S+) \|", CHANGELOG, re.MULTILINE)
    assert row == (requirement(), version("megatron-core"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_have_the_form_of_github(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(names) == len(set(names)) >= 3
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input")
        assert part["attributes"].get("label") or part["attributes"].get("value")


def test_workflow_runs_what_ci_runs():
    steps = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        steps += [step for job in jobs.values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in runs
    words = [word for run in runs if run.startswith("make ") for word in run.split()[1:]]
    targets = [word for word in words if re.fullmatch(r"[a-z-]+", word)]
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert all(re.search(r"@(release/)?v\d+$", step["uses"]) for step in steps if "uses" in step)


def hooks():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return repo["hooks"]


def test_hooks_are_the_linters_of_the_makefile():
    lines = (ROOT / "Makefile").read_text()
    for hook in hooks():
        tool, *flags = hook["entry"].removeprefix(".venv/bin/").split()
        assert hook["language"] == "system"
        assert f"$(BIN)/{' '.join([tool, *flags])}" in lines, hook["entry"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_hooks_run_and_find_what_is_wrong(hook, tmp_path):
    tool, *flags = hook["entry"].removeprefix(".venv/bin/").split()
    bad = {
        "ruff": ("a.py", "import os\nx  = 1\n"),
        "shellcheck": ("a.sh", "#!/bin/sh\nrm -r $1\n"),
        "hadolint": ("Dockerfile", "FROM python\nRUN cd /tmp\n"),
    }
    name, text = bad[tool]
    (tmp_path / name).write_text(text)
    command = [Path(sys.executable).with_name(tool), *flags, tmp_path / name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.fixture
def tagged(tmp_path):
    """Runs .ci/release_notes on a copy whose changelog has a section of this version."""
    for name in (".ci/release_notes", "megatron_cream/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def notes(tag, heading):
        text = CHANGELOG.replace("## [Unreleased]", f"## [Unreleased]\n\n{heading}", 1)
        (tmp_path / "CHANGELOG.md").write_text(
            text + "\n## [0.0.1] - 2020-01-01\n\n- of an older release\n"
        )
        command = [tmp_path / ".ci" / "release_notes", tag]
        return subprocess.run(command, capture_output=True, text=True)

    return notes


def test_a_release_has_the_notes_of_its_version(tagged):
    version = megatron_cream.__version__
    done = tagged(f"v{version}", f"## [{version}] - 2026-01-31")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("### ")
    assert "of an older release" not in done.stdout and "## [" not in done.stdout


def test_a_tag_must_be_the_version_and_in_the_changelog(tagged):
    version = megatron_cream.__version__
    done = tagged("v9.9.9", f"## [{version}] - 2026-01-31")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: the tag is 'v9.9.9': it must be v{version}" in done.stderr
    done = tagged(f"v{version}", f"## [{version}]")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"has no section '## [{version}] - YYYY-MM-DD'" in done.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_lowest_versions_are_those_that_setup_cfg_asks_for():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    extras = [text for name, text in parser["options.extras_require"].items() if name != "dev"]
    wanted = "\n".join([parser["options"]["install_requires"], *extras])
    lower = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", wanted, re.MULTILINE))
    file = (ROOT / "requirements.lowest.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", file, re.MULTILINE))
    assert len(pinned) > 10
    for name, found in pinned.items():
        least = [int(part) for part in lower[name].split(".")]
        assert [int(part) for part in found.split(".")][: len(least)] == least, name
        assert not any(int(part) for part in found.split(".")[len(least) :]), name
    named = re.findall(
        r"^([\w-]+)(?:\[\w+\])?", parser["options"]["install_requires"], re.MULTILINE
    )
    assert set(named) <= pinned.keys()
