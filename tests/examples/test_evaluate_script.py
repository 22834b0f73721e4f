# SPDX-License-Identifier: Apache-2.0
"""The launcher of evaluations: which pairs of checkpoint and length a job gets, its commands."""

import subprocess

import pytest
import yaml
from support import launch

from megatron_cream.cli import make_parser

SCRIPT = launch.ROOT / "examples" / "evaluate.sh"


@pytest.fixture
def evaluate(tmp_path):
    """Run it on two Megatron checkpoints and one of Hugging Face's; returns the evaluate words."""
    for name in ("run", "run/iter_0000500", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").touch()
    checkpoints = " ".join(str(tmp_path / name) for name in ("run", "run/iter_0000500", "model"))

    def call(*flags, **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        given = {"CHECKPOINTS": checkpoints, "LENGTHS": "4K 8K", "OUTPUT": "results", **variables}
        done = subprocess.run(
            ["bash", str(SCRIPT), *flags],
            env=launch.environment(tmp_path, **given),
            capture_output=True,
            text=True,
        )
        return done, [words for words, _ in launch.calls(tmp_path)]

    return call


def places(calls):
    return [words[words.index("--output") + 1] for words in calls]


def test_every_pair_is_evaluated_once_over_all_shards(evaluate):
    done, whole = evaluate("--documents", "8")
    assert done.returncode == 0, done.stderr
    names = ("run", "run-iter_0000500", "model")
    assert places(whole) == [f"results/all/{n}/{length}" for n in names for length in ("4K", "8K")]
    shared = [evaluate("--documents", "8", SHARD=str(i), SHARDS="4")[1] for i in range(4)]
    assert sorted(map(len, shared)) == [1, 1, 2, 2]
    assert sorted(words for shard in shared for words in shard) == sorted(whole)
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert evaluate("--documents", "8", **slurm)[1] == shared[1]


def test_its_commands_are_those_of_evaluate(evaluate):
    _, calls = evaluate("--cases", "3", TASKS="needle perplexity", DATA="text")
    for words in calls:
        assert words[:3] == ["-m", "megatron_cream", "evaluate"]
        args = make_parser("evaluate").parse_args(words[3:])
        assert (args.hf is None) == (args.checkpoint is not None) and args.data == "text"
    assert "--hf" in calls[-1] and "--checkpoint" in calls[0]


def test_a_model_is_split_over_the_gpus_of_a_job(evaluate):
    _, calls = evaluate(GPUS_PER_NODE="4")
    flags = launch.flags(calls[0])
    assert flags["--nproc-per-node"] == flags["--tensor-model-parallel-size"] == ("4",)
    assert calls[0][1] == "torch.distributed.run"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CHECKPOINTS": ""}, "CHECKPOINTS is not set"),
        ({"CHECKPOINTS": "no/such"}, "CHECKPOINTS has no/such: it must be a folder"),
        ({"LENGTHS": ""}, "LENGTHS is not set"),
        ({"SHARD": "4", "SHARDS": "4"}, "SHARD is 4: it must be below SHARDS, 4"),
    ],
)
def test_what_is_wrong_ends_in_status_2(evaluate, variables, said):
    done, calls = evaluate(**variables)
    assert done.returncode == 2 and said in done.stderr and not calls


def test_two_folders_of_one_name_would_share_their_results(evaluate, tmp_path):
    (tmp_path / "other" / "model").mkdir(parents=True)
    done, calls = evaluate(CHECKPOINTS=f"{tmp_path}/model {tmp_path}/run {tmp_path}/other/model/")
    assert done.returncode == 2 and not calls
    assert "CHECKPOINTS has two folders named model, whose results" in done.stderr


def test_launchers_share_the_pairs_out():
    folder = launch.ROOT / "examples"
    job = yaml.safe_load((folder / "kubernetes" / "evaluate.yaml").read_text())["spec"]
    [container] = job["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    pairs = len(given["CHECKPOINTS"].split()) * len(given["LENGTHS"].split())
    assert int(given["SHARDS"]) == job["completions"] <= pairs
    assert int(given["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    task = yaml.safe_load((folder / "skypilot" / "evaluate.yaml").read_text())
    assert "SHARDS=$SKYPILOT_NUM_NODES SHARD=$SKYPILOT_NODE_RANK" in task["run"]
    run = yaml.safe_load((folder / "skypilot" / "run.yaml").read_text())
    assert [task[name] for name in ("setup", "file_mounts")] == [
        run[name] for name in ("setup", "file_mounts")
    ]
