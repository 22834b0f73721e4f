# SPDX-License-Identifier: Apache-2.0
"""A real Slurm of two nodes on this host, in a folder: munge, slurmctld and two slurmds.

Debian and Ubuntu have it as ``apt-get install slurm-wlm munge``. Nothing of a Slurm that is
installed for use is touched: every path and port is this one's own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_PATHS = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
_CONFIG = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts again when credentials of its first start have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Two GPUs a node by name; no program here opens these files.
_GPUS = "NodeName=node[1-2] Name=gpu Count=2 File=/dev/null,/dev/zero\n"


def why_not() -> str | None:
    """Return why no Slurm can be started here, or None."""
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=_PATHS)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    return None


@contextmanager
def cluster(folder: Path):
    """Start the cluster; yields the environment for sbatch and its kind."""
    folder.chmod(0o755)
    processes: list[subprocess.Popen] = []
    environment = {**os.environ, "PATH": _PATHS, "SLURM_CONF": str(folder / "slurm.conf")}
    # All nodes are this host, whatever it is called.
    environment |= {"HEAD": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    _write(folder)
    try:
        for words in _commands(folder):
            log = (folder / f"{words[0]}.out").open("a")
            processes.append(
                subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
            if words[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), "munged", folder)
        _wait(lambda: _idle(environment) == 2, "two idle nodes", folder)
        yield environment
        # A job outlives its daemons.
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=30)
        _wait(lambda: _idle(environment) == 2, "end of all jobs", folder)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _write(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    config = _CONFIG.format(host=host, folder=folder, ports=_free_ports(3), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(config)
    (folder / "gres.conf").write_text(_GPUS)


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _commands(folder: Path) -> list[list[str]]:
    names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    paths = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in names]
    paths[1] = f"--socket={folder}/munge.socket"
    nodes = [["slurmd", "-D", "-N", name] for name in ("node1", "node2")]
    return [["munged", "--foreground", "--force", *paths], ["slurmctld", "-D"], *nodes]


def _idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format", "%T"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    return done.stdout.split().count("idle")


def _wait(reached, what: str, folder: Path) -> None:
    end = time.monotonic() + 60
    while not reached():
        if time.monotonic() > end:
            logs = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"no {what} after a minute:\n{logs}")
        time.sleep(0.2)
