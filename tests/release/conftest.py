# SPDX-License-Identifier: Apache-2.0
"""A Python environment that has the packages of this one, but not this one's megatron_cream."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root():
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory):
    """Environment variables under which pip installs a project and nothing else, offline.

    The dependencies, 6 GB, are those of this environment, linked one by one: neither its
    megatron_cream can be found there, nor its pip.
    """
    folder = tmp_path_factory.mktemp("site-packages")
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for entry in site.iterdir():
        if "megatron_cream" not in entry.name and not entry.name.startswith(("pip", "_virtualenv")):
            (folder / entry.name).symlink_to(entry)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(folder),
        "PYTHON": sys.executable,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads the opposite of the name: off
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
    }
