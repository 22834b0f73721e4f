# SPDX-License-Identifier: Apache-2.0
"""One node's processes meet whatever the host calls itself: image builds, laptops, chroots."""

import os
import shlex
import subprocess
import sys

import pytest
from support.launch import ROOT

from megatron_cream import torchrun

# In namespaces of their own: a host's name that nothing knows, and no /etc/hosts.
NAMELESS = ["unshare", "--uts", "--mount", "sh", "-c"]
RENAME = 'mount --bind /dev/null /etc/hosts && hostname no-such-host.invalid && exec "$@"'


def nameless(*command):
    return [*NAMELESS, RENAME, "sh", *command]


def why_not():
    try:
        done = subprocess.run(nameless("hostname"), capture_output=True, text=True)
    except FileNotFoundError:
        return "unshare is not installed"
    return None if done.returncode == 0 else f"unshare needs root: {done.stderr.strip()}"


def test_bash_and_python_say_the_same():
    shell = f'source "{ROOT}/examples/torchrun.sh"; launch_on_one_node 3; '
    shell += 'printf "%s\\n" "$GLOO_SOCKET_IFNAME" "${LAUNCH_ARGS[@]}"'
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True)
    interface, *arguments = done.stdout.splitlines()
    assert arguments == torchrun.command(3)[3:]
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        assert interface == torchrun.environment()["GLOO_SOCKET_IFNAME"] == "lo"


def test_nothing_is_started_by_the_hosts_name():
    """torchrun --standalone asks for it."""
    found = subprocess.run(
        ["grep", "-rlw", "--include=*.py", "--include=*.sh", "-e", "--standalone"]
        + ["megatron_cream", "examples", "tools", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    allowed = {
        "megatron_cream/torchrun.py",
        "examples/torchrun.sh",
        "tests/examples/test_torchrun.py",
        "tests/docs/test_commands.py",  # which knows torchrun's flags
    }
    assert set(found) <= allowed


def test_ranks_meet_on_a_host_whose_name_nothing_knows(tmp_path):
    if why_not():
        pytest.skip(why_not())
    script = tmp_path / "sum.py"
    script.write_text(
        "import os, torch, torch.distributed as d\n"
        'd.init_process_group("gloo")\n'
        "ones = torch.ones(1)\n"
        "d.all_reduce(ones)\n"
        # One write, or the lines of two ranks mix.
        "os.write(1, f\"sum {int(ones)} {os.environ['MASTER_ADDR']}\\n\".encode())\n"
        "d.destroy_process_group()\n"
    )
    done = subprocess.run(
        nameless(*torchrun.command(2, str(script))),
        env=torchrun.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 2 127.0.0.1") == 2
    assert "no-such-host" not in done.stderr, "nobody asked for that name"


@pytest.mark.slow
def test_an_install_is_checked_on_a_host_whose_name_nothing_knows():
    """What an image build does."""
    if why_not():
        pytest.skip(why_not())
    command = nameless(sys.executable, str(ROOT / "tools" / "check_install.py"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, shlex.join(command) + done.stderr
    assert "2 training steps on a CPU" in done.stdout
