# SPDX-License-Identifier: Apache-2.0
"""What launchers of clusters start: their files parse, and their shell reaches a launch script."""

import os
import shlex
import subprocess

import pytest
import yaml
from support import launch

EXAMPLES = launch.ROOT / "examples"
SLURM = EXAMPLES / "slurm" / "run.sh"


def load(path):
    return yaml.safe_load((EXAMPLES / path).read_text())


def script_sees(shell, tmp_path, **variables):
    """Run shell text of a launcher whose launch script prints what it is given, node by node."""
    target = tmp_path / "script.sh"
    target.write_text('echo "$NODES $NODE_RANK $HEAD $PORT ${GPUS_PER_NODE:-} ${RANK:-none}"\n')
    done = subprocess.run(
        ["bash", "-c", shell.replace("examples/llama-2-70b/128k.sh", str(target))],
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", "PORT": "", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(" ")


def test_a_pytorchjob_starts_the_same_pod_on_every_node(tmp_path):
    spec = load("kubernetes/pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]
    master, worker = spec["Master"], spec["Worker"]
    assert master["template"] == worker["template"]
    assert master["replicas"] + worker["replicas"] == 8
    assert {master["restartPolicy"], worker["restartPolicy"]} == {"OnFailure"}, "status 75 as well"
    pod = master["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for that name"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][:2] == ["bash", "-c"]
    operator = {"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "23456"}
    seen = script_sees(container["command"][2], tmp_path, **operator)
    assert seen == ["8", "3", "head", "23456", "", "none\n"]


def test_a_sky_task_starts_the_script_of_its_environment(tmp_path):
    task = load("skypilot/run.yaml")
    assert (EXAMPLES.parent / task["envs"]["SCRIPT"]).is_file()
    assert task["num_nodes"] == 8 and task["resources"]["accelerators"] == "H100:8"
    [store] = task["file_mounts"]
    places = [task["envs"][name] for name in ("DATA", "BASE", "OUT")]
    assert all(place.startswith(f"{store}/") for place in places)
    sky = {"SKYPILOT_NUM_NODES": "8", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    sky |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SCRIPT": str(tmp_path / "script.sh")}
    seen = script_sees(task["run"], tmp_path, **sky)
    assert seen == ["8", "2", "10.0.0.1", "", "8", "none\n"]


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script with commands of Slurm that keep their words and do as Slurm does."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n"; echo "scontrol $*" >>"$LOG"',
        # The task of the second node: what follows srun's own flags, and the container's.
        "srun": 'printf "%q " "$@" >>"$LOG"; echo >>"$LOG"\n'
        'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 "$@"',
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    target = tmp_path / "script.sh"
    target.write_text('echo "$NODES $NODE_RANK $HEAD $PORT $*"\nexit "${ENDS:-0}"\n')

    def start(*arguments, **variables):
        log = tmp_path / "log"
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LOG": str(log),
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "123456",
            **variables,
        }
        done = subprocess.run(
            ["bash", str(SLURM), *arguments], env=environment, capture_output=True, text=True
        )
        return done, shlex.split(log.read_text()) if log.exists() else []

    return start, str(target)


def test_slurm_starts_one_script_a_node(slurm):
    start, script = slurm
    done, _ = start(script, "--lr", "1e-5")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 1 node7 23456 --lr 1e-5\n"


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ("pyxis", ["--container-image", "an image", "--container-mounts"]),
        ("apptainer", ["apptainer", "exec", "--nv", "an image", "--bind"]),
    ],
)
def test_slurm_starts_it_in_a_container(slurm, container, words):
    start, script = slurm
    done, log = start(script, CONTAINER=container, IMAGE="an image", MOUNTS="/a:/b")
    assert done.returncode == 0, done.stderr
    assert set(words) <= set(log)
    assert f"{os.getcwd()}:{os.getcwd()},/a:/b" in log
    assert done.stdout.startswith("2 1 node7 23456")


def test_slurm_requeues_a_run_that_stopped_before_its_end_and_no_other(slurm):
    start, script = slurm
    done, log = start(script, ENDS="75")
    assert done.returncode == 75 and log[-2:] == ["requeue", "123456"]
    done, log = start(script, ENDS="1")
    assert done.returncode == 1 and log.count("requeue") == 1, "only the one before"


def test_slurm_refuses_what_it_cannot_start(slurm):
    start, script = slurm
    for arguments, variables, said in [
        ([], {}, "error: the first argument must be a launch script"),
        ([script], {"CONTAINER": "pyxis"}, "error: IMAGE is not set"),
        ([script], {"CONTAINER": "docker", "IMAGE": "i"}, "error: CONTAINER is docker"),
    ]:
        done, _ = start(*arguments, **variables)
        assert done.returncode == 2 and said in done.stderr


def test_the_batch_script_asks_slurm_for_what_it_counts_on():
    asked = {line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")}
    for flag in ("--ntasks-per-node=1", "--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {flag}" in asked
