# SPDX-License-Identifier: Apache-2.0
"""The link to the repository, from the clone that the site is built in; a hook of MkDocs.

The pages name no address, so that a fork's site leads to the fork. ``REPOSITORY_URL`` takes the
place of the clone's own ``origin``. Without either there is no link, and the build says so.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks.repository")
_ADDRESS = re.compile(r"(?:\w+://)?(?:[^@/]+@)?(?P<host>[\w.-]+\.\w+)(?::\d+)?[:/](?P<path>.+)")


def web_address(remote: str) -> str | None:
    """Return the https address of a git remote without user or password; None for a local one."""
    match = _ADDRESS.fullmatch(remote.rstrip("/").removesuffix(".git"))
    return f"https://{match['host']}/{match['path']}" if match else None


def origin(folder: Path) -> str:
    """Return what ``git remote get-url origin`` says in ``folder``, empty without one."""
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a build from an archive, without git
        return ""


def on_config(config: Any, **_: Any) -> Any:
    """Set the link that the head of each page has."""
    remote = os.environ.get("REPOSITORY_URL") or origin(Path(config.config_file_path).parent)
    address = web_address(remote)
    if address:
        config.repo_url = address
        config.repo_name = "/".join(address.split("/")[-2:])
    else:
        _LOG.info("no link to the repository: no REPOSITORY_URL, and origin is %r", remote)
    return config
