# SPDX-License-Identifier: Apache-2.0
"""Wrong command lines: each ends in a line that names its flag, or trains.

Every flag with a value of the groups below meets every bad value, then come pairs drawn by a seed
and a list by hand. What is accepted is accepted by the dry run too, and a step of it is trained.
Half an hour on two cores: ``pytest -m slow tests/attack/test_command_lines.py``.
``support/attack.py`` says what decides its size and its seed: the pairs.
"""

import argparse
import random
import re
import sys

import pytest
from support import ranks
from support.attack import SEED, rounds
from support.runs import FLAGS

from megatron_cream.errors import UserError

# Hours where others use the cores: the limit of one test of the default run is not for it.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.usefixtures("cpu_megatron"),
]

GROUPS = (
    *("context extension", "training", "learning rate and weight decay", "network size"),
    *("regularization", "validation", "data and dataloader", "tokenizer", "logging"),
    *("RNG and initialization", "checkpointing", "transformer configuration", "distributed init"),
)
VALUES = ("-1", "0", "1", "3", "-0.5", "nan", "inf", "1e30", "99999999999999999999", "x", "")
BY_HAND = [
    "--train-iters 2 --train-samples 8",
    "--save /proc/none --save-interval 1",
    "--load /proc/none --finetune",
    "--pipeline-model-parallel-layout Et|L",
    "--hybrid-layer-pattern *-",
    "--hybrid-layer-pattern M",
    "--recompute-granularity full",
    "--recompute-method uniform",
    "--num-experts 2",
    "--num-experts 3 --expert-model-parallel-size 2",
    "--use-torch-fsdp2",
    "--overlap-param-gather",
    "--optimizer muon",
    "--optimizer-cpu-offload",
    "--deterministic-mode",
    "--rampup-batch-size 2 2 100",
    "--rampup-batch-size 1",
    "--step-batch-size-schedule 0:2",
    "--cuda-graph-impl local",
    "--fp8-format e4m3",
    "--normalization RMSNorm",
    "--swiglu --squared-relu",
    "--window-size 4",
    "--window-size 32,0",
    "--exit-signal SIGKILL",
    "--data-args-path /dev/null",
    "--cream-head-lengths 1 2 3 4 5 6 7",
    "--rope-options beta_fast=-1",
    "--rope-interpolation longrope",
    "--rope-factors-file /dev/null --rope-interpolation longrope",
    "--attention-backend local",
    "--tokenizer-type MultimodalTokenizer",
    "--tokenizer-type SFTTokenizer --tokenizer-model /",
    "--replication",
    "--spec a b",
    "--ckpt-format torch",
    "--ckpt-format torch_dcp",
    "--non-persistent-ckpt-type local",
    "--lr-decay-style WSD --lr-wsd-decay-iters 1",
]
# What needs another machine than this, or names no flag because the parser cannot know which.
ELSEWHERE = re.compile(r"unrecognized arguments|expected|is not installed|needs the package")
PAIRS = rounds(200)


@pytest.fixture(scope="module")
def actions():
    """The parser's flags that take a value, by option string, of the groups above."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_cream.training.arguments import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    return [
        action.option_strings[0]
        for group in parser._action_groups
        if group.title in GROUPS
        for action in group._group_actions
        if action.nargs != 0 and action.choices is None and action.option_strings
    ]


def command_lines(flags):
    alone = [[flag, value] for flag in flags for value in VALUES]
    rng = random.Random(SEED)
    pairs = [[*rng.choice(alone), *rng.choice(alone)] for _ in range(PAIRS)]
    return [*alone, *pairs, *(line.split() for line in BY_HAND)]


def said_of(line, base, monkeypatch):
    """The error of a command line, or None where it is accepted; anything else is raised."""
    from megatron.training.training import destroy_global_state

    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    monkeypatch.setattr(sys, "argv", ["pretrain", *cpu_flags(), "--cpu", *base, *line])
    try:
        pretrain.prepare()
    except (UserError, OSError) as error:
        return str(error)
    finally:
        destroy_global_state()
    return None


def names(error, line):
    """Whether an error names a flag of the line, by Megatron's name of it or by ours."""
    flags = [word for word in line if word.startswith("--")]
    spelled = [flag[2:].replace("-", "_") for flag in flags]
    plain = error.replace("-", "_")
    return any(name in plain or name.split("_")[0] in plain for name in spelled)


def test_wrong_command_lines(flags, actions, monkeypatch, tmp_path, capsys):
    from megatron_cream.mcore import fake_world

    monkeypatch.chdir(tmp_path)
    base = [*flags, "--train-iters", "1", "--eval-iters", "0", "--split", "100,0,0"]
    wrong, accepted = [], []
    for line in command_lines(actions):
        try:
            error = said_of(line, base, monkeypatch)
        except (Exception, SystemExit) as other:
            wrong.append(f"{line}: {type(other).__name__}: {other}")
            continue
        if error is None:
            accepted.append(line)
            try:
                fake_world.parse(["--cpu", *base, *line], 1)
            except Exception as other:
                wrong.append(f"{line}: accepted, and the dry run says {other!r}")
        elif not names(error, line) and not ELSEWHERE.search(error):
            wrong.append(f"{line}: does not name its flag: {error}")
        elif "\n" in error:
            wrong.append(f"{line}: more than one line: {error}")
    with capsys.disabled():
        print(f"\n{len(wrong)} wrong, {len(accepted)} accepted")
    (tmp_path / "accepted").write_text("\n".join(" ".join(line) for line in accepted))
    assert not wrong, "\n".join(wrong)
    failed = []
    for number, line in enumerate(accepted):
        run = ranks.train(tmp_path / str(number), [*base, *line], wait=False)
        if any(run.status) and not run.lines("error:"):
            failed.append(f"{line}: {run.log.splitlines()[-1:]}")
    assert not failed, "\n".join(failed)


def test_base_is_accepted(monkeypatch, dataset):
    assert said_of([], [*FLAGS, "--data-path", dataset], monkeypatch) is None
