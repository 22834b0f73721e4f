# SPDX-License-Identifier: Apache-2.0
"""What launchers of clusters start: their files parse, and their shell reaches a launch script."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from support import crds, launch

EXAMPLES = launch.ROOT / "examples"
SLURM = EXAMPLES / "slurm" / "run.sh"
CRDS = sorted(Path(__file__).with_name("crds").glob("*.json"))


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


def container_of(replica):
    [container] = replica["template"]["spec"]["containers"]
    return container


def test_a_pytorchjob_starts_the_same_pod_on_every_node(tmp_path):
    spec = load("kubernetes/pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]
    master, worker = spec["Master"], spec["Worker"]
    assert master["template"] == worker["template"]
    assert master["replicas"] + worker["replicas"] == 4
    assert {master["restartPolicy"], worker["restartPolicy"]} == {"ExitCode"}
    given = {each["name"]: each.get("value") for each in container_of(master)["env"]}
    assert int(given["STOPPED_STATUS"]) >= 128, "or what stopped would have failed for good"
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


def test_a_trainjob_starts_the_same_pod_on_every_node(tmp_path):
    runtime, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "trainjob.yaml").read_text())
    assert job["spec"]["runtimeRef"] == {
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    label = node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert label == "trainer" and node["name"] == "node", "Trainer looks for both"
    pod = node["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy asks for that"
    disrupted, failed = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert disrupted["action"] == "Ignore" and failed["action"] == "FailJob"
    assert failed["onExitCodes"]["containerName"] == container["name"]
    again = failed["onExitCodes"]["values"]
    assert 75 in again and not {1, 2} & set(again), "what stopped goes on, what failed does not"
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 4
    [gpus] = [each["value"] for each in trainer["env"] if each["name"] == "GPUS_PER_NODE"]
    assert int(gpus) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    shell = trainer["command"][2] + "; env | grep PET_"
    torchrun = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "29400"}
    given = {f"PET_{name}": value for name, value in torchrun.items()}
    seen = script_sees(shell, tmp_path, GPUS_PER_NODE=gpus, PET_NPROC_PER_NODE="auto", **given)
    assert seen == ["8", "3", "head", "29400", "8", "none\n"]


def documents(path):
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes" / path).read_text()))


@pytest.mark.parametrize("path", CRDS, ids=lambda path: path.stem)
def test_kubernetes_knows_every_field(path):
    """By the real definitions, of the oldest and the newest Trainer v2."""
    crd = json.loads(path.read_text())
    manifest = "pytorchjob.yaml" if crd["kind"] == "PyTorchJob" else "trainjob.yaml"
    [document] = [each for each in documents(manifest) if each["kind"] == crd["kind"]]
    assert document["apiVersion"] == crd["apiVersion"]
    assert crds.errors(crd["schema"], document) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda job: job["spec"]["trainer"].update(numnodes=8), "spec.trainer: numnodes is not"),
        (lambda job: job["spec"]["trainer"].update(numNodes="8"), "'8' is not of type integer"),
        (lambda job: job["spec"]["trainer"]["env"][0].pop("name"), "env.0: name is missing"),
        (lambda job: job["spec"]["runtimeRef"].pop("name"), "runtimeRef: name is missing"),
        (
            lambda job: job["spec"]["trainer"]["resourcesPerNode"].update(
                limits={"nvidia.com/gpu": "many"}
            ),
            "'many' is not of the form",
        ),
    ],
)
def test_kubernetes_would_refuse_a_mistake(change, said):
    crd = json.loads((CRDS[0].parent / "trainjob-trainer-2.0.0.json").read_text())
    _, job = documents("trainjob.yaml")
    change(job)
    assert said in "\n".join(crds.errors(crd["schema"], job))


def test_kubernetes_imports_and_exports_without_a_gpu():
    """One manifest for both, for the run that the training manifests train and no more."""
    text = (EXAMPLES / "kubernetes" / "convert.yaml").read_text()
    trained = load("kubernetes/pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]["Master"]
    [trainer] = trained["template"]["spec"]["containers"]
    runs = {each["name"]: each.get("value") for each in trainer["env"]}
    assert runs.pop("STEPS") == "train" and runs.pop("STOPPED_STATUS")
    for step in ("import", "export"):
        job = yaml.safe_load(text.replace("import-or-export", step))
        assert job["metadata"]["name"] == f"llama-2-70b-128k-{step}"
        [container] = job["spec"]["template"]["spec"]["containers"]
        given = {each["name"]: each.get("value") for each in container["env"]}
        assert given.pop("STEPS") == step
        assert given.items() <= runs.items()
        assert "nvidia.com/gpu" not in json.dumps(job)
        assert container["command"][1] in trainer["command"][2]


def test_a_sky_task_starts_the_script_of_its_environment(tmp_path):
    task = load("skypilot/run.yaml")
    assert (EXAMPLES.parent / task["envs"]["SCRIPT"]).is_file()
    assert task["secrets"] == {"HF_TOKEN": ""}, "--secret HF_TOKEN gives it"
    assert "uv venv --python 3.12" in task["setup"], "its images have an older Python"
    assert task["num_nodes"] == 4 and task["resources"]["accelerators"] == "H100:8"
    [store] = task["file_mounts"]
    places = [task["envs"][name] for name in ("DATA", "BASE", "OUT")]
    assert all(place.startswith(f"{store}/") for place in places)
    sky = {"SKYPILOT_NUM_NODES": "8", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    sky |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SCRIPT": str(tmp_path / "script.sh")}
    seen = script_sees(task["run"], tmp_path, **sky)
    assert seen == ["8", "2", "10.0.0.1", "", "8", "none\n"]


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script with commands of Slurm that keep their words and do as Slurm does.

    A launch script that prints what it sees; with STOPS it says so to the batch script, too, and
    ENDS is its exit status. tests/cluster has the real Slurm.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n"; echo "scontrol $*" >>"$LOG"',
        "scancel": 'echo "scancel $*" >>"$LOG"',
        # The task of the second node: what follows srun's own flags, and the container's.
        "srun": 'printf "%q " "$@" >>"$LOG"; echo >>"$LOG"\n'
        'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 "$@"',
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    target = tmp_path / "script.sh"
    target.write_text(
        'echo "$STEPS $NODES $NODE_RANK $HEAD $PORT ${GPUS_PER_NODE:-none} $*"\n'
        '[ "${STOPS:-}" = "$STEPS" ] && echo 7 >"$STOPPED_FILE"\n'
        '[ "${SIGNALLED_AT:-}" = "$STEPS" ] && kill -USR1 "$(cat pid)" && sleep 0.2\n'
        '[ "${AT:-$STEPS}" = "$STEPS" ] || exit 0\n'
        'exit "${ENDS:-0}"\n'
    )

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
            ["bash", "-c", f'echo $$ >pid; exec bash {SLURM} "$@"', "run", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done, shlex.split(log.read_text()) if log.exists() else []

    return start, str(target)


def test_slurm_imports_and_exports_on_the_first_node_and_trains_on_all(slurm):
    start, script = slurm
    done, log = start(script, "--lr", "1e-5")
    assert done.returncode == 0, done.stderr
    rest = "2 1 node7 23456 none --lr 1e-5"
    assert done.stdout == f"import {rest}\ntrain {rest}\nexport {rest}\n"
    assert log.count("--nodes=1") == log.count("--nodelist=node7") == 2
    assert log.count("--kill-on-bad-exit=0") == 3, "a node that ends ends no other"
    done, _ = start(script, STEPS="train", HEAD="10.0.0.1")
    assert done.stdout == "train 2 1 10.0.0.1 23456 none \n"


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "h100:8"}, "4"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "8"),
        ({"SLURM_GPUS_PER_NODE": "a100:4,v100:2"}, "6"),
        ({"SLURM_GPUS_PER_NODE": "0"}, "none"),
        ({"SLURM_GPUS_ON_NODE": "4", "GPUS_PER_NODE": "2"}, "2"),
    ],
)
def test_slurm_says_how_many_gpus_a_node_has(slurm, given, gpus):
    start, script = slurm
    done, _ = start(script, STEPS="train", **given)
    assert done.stdout == f"train 2 1 node7 23456 {gpus} \n"


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
    here = Path(script).parent
    assert f"{here}:{here},/a:/b" in log
    assert done.stdout.startswith("import 2 1 node7 23456")


@pytest.mark.parametrize("step", ["import", "train", "export"])
@pytest.mark.parametrize("status", ["75", "143", "0"])
def test_slurm_requeues_what_node_0_says_stopped_whatever_other_nodes_end_with(slurm, step, status):
    start, script = slurm
    done, log = start(script, STOPS=step, AT=step, ENDS=status)
    assert done.returncode == 75 and log[-2:] == ["requeue", "123456"]
    assert done.stdout.splitlines()[-1].startswith(step), "and starts no further step"
    done, log = start(script)
    assert done.returncode == 0 and log.count("requeue") == 1, "the note of last time is gone"


@pytest.mark.parametrize("status", ["1", "2", "143"])
def test_slurm_does_not_requeue_what_failed(slurm, status):
    start, script = slurm
    done, log = start(script, AT="train", ENDS=status)
    assert done.returncode == int(status) and "requeue" not in log
    assert "export" not in done.stdout


@pytest.mark.parametrize(("at", "status"), [("import", "0"), ("import", "138"), ("train", "138")])
def test_slurm_requeues_what_a_signal_met_unprepared(slurm, at, status):
    """The batch script gets the signal, passes it on, and starts nothing new."""
    start, script = slurm
    done, log = start(script, SIGNALLED_AT=at, AT=at, ENDS=status)
    assert done.returncode == 75 and log[-2:] == ["requeue", "123456"]
    assert log[log.index("scancel") + 1 :][:2] == ["--signal=USR1", "123456"]
    assert done.stdout.splitlines()[-1].startswith(at)


def test_slurm_takes_another_nodes_older_view_for_no_failure(slurm):
    start, script = slurm
    done, log = start(script, AT="train", ENDS="75")
    assert done.returncode == 0 and "requeue" not in log
    assert "export" in done.stdout


def test_slurm_refuses_what_it_cannot_start(slurm):
    start, script = slurm
    for arguments, variables, said in [
        ([], {}, "error: the first argument must be a launch script"),
        ([script], {"CONTAINER": "pyxis"}, "error: IMAGE is not set"),
        ([script], {"CONTAINER": "docker", "IMAGE": "i"}, "error: CONTAINER is docker"),
    ]:
        done, _ = start(*arguments, **variables)
        assert done.returncode == 2 and said in done.stderr


SBATCH = (
    '#!/usr/bin/env bash\nprintf "%q " "$STEPS" "$@" >>"$LOG"; echo >>"$LOG"\n'
    'cp "${@: -2:1}" "${LOG%/*}/$STEPS.run"; echo "$(wc -l <"$LOG");cluster"\n'
)


def submitted(tmp_path, *arguments, sbatch=SBATCH, **variables):
    """Words that submit.sh gives sbatch, job by job, with the step of each."""
    log = tmp_path / "sbatch.log"
    log.unlink(missing_ok=True)
    (tmp_path / "sbatch").write_text(sbatch)
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(
        ["bash", str(EXAMPLES / "slurm" / "submit.sh"), *arguments],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "DATA": "d", **variables},
        capture_output=True,
        text=True,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    return done, [shlex.split(line) for line in lines]


def test_slurm_imports_trains_and_exports_in_jobs_of_their_own(tmp_path):
    script = str(EXAMPLES / "llama-2-70b" / "128k.sh")
    cpus = {"CPU_SBATCH": "--partition cpu", "GPU_SBATCH": "--partition gpu"}
    done, jobs = submitted(tmp_path, script, "--account", "me", **cpus)
    assert done.returncode == 0, done.stderr
    assert [job[0] for job in jobs] == ["import", "train", "export"]
    assert all(job[-1] == script and "me" in job for job in jobs)
    assert [job[-2] == str(SLURM) for job in jobs] == [False, True, False]
    for job in (jobs[0], jobs[2]):
        assert "--exclusive" not in (tmp_path / f"{job[0]}.run").read_text(), "holds no GPU node"
        assert launch.flags(job)["--cpus-per-task"] == ("8",)
    assert "in the default partition" not in done.stdout
    assert all("--kill-on-invalid-dep=yes" in job for job in jobs), "what failed holds no queue"
    flags = [launch.flags(job) for job in jobs]
    assert [each["--nodes"] for each in flags] == [("1",), ("4",), ("1",)]
    assert [each.get("--gpus-per-node") for each in flags] == [("0",), None, ("0",)]
    assert [each["--partition"] for each in flags] == [("cpu",), ("gpu",), ("cpu",)]
    waits = [each.get("--dependency") for each in flags]
    assert waits == [None, ("afterok:1",), ("afterok:2",)]
    assert flags[1]["--signal"] == ("B:USR1@603",), "120 s and 966 GB at 2 GB/s"
    done, jobs = submitted(tmp_path, str(EXAMPLES / "llama-2-7b" / "32k.sh"), NODES="2")
    assert "8 CPUs and 32 GB each in the default partition" in done.stdout
    train = launch.flags(jobs[1])
    assert train["--nodes"] == ("2",) and train["--signal"][0] == "B:USR1@300"
    done, jobs = submitted(tmp_path, "no/such.sh")
    assert done.returncode == 2 and not jobs and "error: the first argument" in done.stderr
    done, jobs = submitted(tmp_path, script, DATA="")
    assert done.returncode == 2 and not jobs and "error: DATA is not set" in done.stderr


def test_a_job_that_slurm_refuses_cancels_those_before_it(tmp_path):
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "$@" >"${LOG%/*}/cancelled"\n')
    (tmp_path / "scancel").chmod(0o755)
    refuses_the_third = (
        '#!/bin/sh\necho x >>"$LOG"; n=$(wc -l <"$LOG"); [ "$n" -lt 3 ] && echo "$n"\n'
    )
    script = str(EXAMPLES / "llama-2-70b" / "128k.sh")
    done, _ = submitted(tmp_path, script, sbatch=refuses_the_third)
    assert done.returncode == 1 and "not all three jobs were accepted: 1 2" in done.stderr
    assert (tmp_path / "cancelled").read_text() == "1 2\n"


def test_the_batch_script_asks_slurm_for_what_it_counts_on():
    asked = {line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")}
    for flag in ("--ntasks-per-node=1", "--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {flag}" in asked
