# SPDX-License-Identifier: Apache-2.0
"""Our scalars: what the real trainer hands to its writers, against coverage counted anew."""

import json

import pytest
from support import forks, ranks, recorder
from support.runs import ITERATIONS

from megatron_cream.config import ExtensionConfig
from megatron_cream.positions import coverage, make_strategy
from megatron_cream.training.progress import COVERAGE, MIDDLE, TOKENS, PositionsSoFar, Scalars

BATCH = 4  # of the flags that tests share


def read(file):
    """Values by writer, name and step."""
    lines = map(json.loads, file.read_text().splitlines())
    return {(writer, name, step): value for writer, name, value, step in lines}


def written(folder, flags, *more, count=1):
    board = ["--tensorboard-dir", str(folder / "board"), *more]
    ranks.call(folder, recorder.train, count, [*flags, *board], str(folder / "scalars"))
    return read(folder / "scalars")


def counted(samples):
    return coverage(make_strategy("cream", 96, 768), samples, seed=1234)


def test_two_stages_write_what_was_trained(tmp_path, flags):
    """On the last rank alone, every second iteration, to both writers."""
    project = ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path)]
    layout = ["--pipeline-model-parallel-size", "2", "--tensorboard-log-interval", "2"]
    found = written(tmp_path, flags, *project, *layout, count=2)
    for writer in ("tensorboard", "wandb"):
        ours = sorted(step for w, name, step in found if (w, name) == (writer, COVERAGE))
        assert ours == [2, 4, 6]
        for step in ours:
            expected = counted(BATCH * step)
            assert found[writer, COVERAGE, step] == expected.covered
            assert found[writer, MIDDLE, step] == pytest.approx(expected.token_thirds[1])
        assert (writer, TOKENS, 2) not in found, "there is no interval before the first"
        assert all(found[writer, TOKENS, step] > 0 for step in ours[1:])
    values = [found["tensorboard", COVERAGE, step] for step in (2, ITERATIONS)]
    assert values[0] < values[1] < 1, "the run is long enough to see it grow"


def test_a_resumed_run_counts_what_was_trained_before(tmp_path, flags):
    save = ["--save", str(tmp_path / "out"), "--load", str(tmp_path / "out")]
    save += ["--save-interval", "3", "--eval-iters", "0"]
    written(tmp_path / "first", flags, *save, "--exit-interval", "3")
    found = written(tmp_path / "second", flags, *save)
    steps = sorted(step for _, name, step in found if name == COVERAGE)
    assert steps == [4, 5, 6]
    for step in steps:
        assert found["tensorboard", COVERAGE, step] == counted(BATCH * step).covered


def test_a_run_that_does_not_log_is_left_alone(flags):
    assert forks.call(recorder.trainers_log, flags, False) is False
    log = ["--tensorboard-dir", "board"]
    assert forks.call(recorder.trainers_log, [*flags, *log], False) is True
    with pytest.raises(ImportError, match=r"training\.training_log is gone"):
        forks.call(recorder.trainers_log, [*flags, *log], True)


@pytest.mark.parametrize("name", ["full", "cream", "pose", "randpos"])
def test_positions_so_far_are_those_of_coverage(name):
    strategy = make_strategy(name, 96, 768)
    so_far = PositionsSoFar(strategy, seed=7)
    assert so_far.after(0) == {}
    for samples in (3, 10, 40):
        expected = coverage(strategy, samples, seed=7)
        values = so_far.after(samples)
        assert values[COVERAGE] == expected.covered
        assert values[MIDDLE] == pytest.approx(expected.token_thirds[1])


def test_counting_ends_where_coverage_has_converged(monkeypatch):
    monkeypatch.setattr("megatron_cream.training.start_block._SAMPLES", 5)
    so_far = PositionsSoFar(make_strategy("cream", 96, 768), seed=7)
    assert so_far.after(4) != so_far.after(5) == so_far.after(1_000_000)
    assert so_far.counted == 5


def extension(**changes):
    return ExtensionConfig(96, 768, 96, position_strategy="cream", **changes)


def test_tokens_a_second():
    times = iter([10.0, 12.0, 12.0, 16.0])
    scalars = Scalars(extension(), clock=lambda: next(times))
    assert TOKENS not in scalars.at(4)
    assert scalars.at(12)[TOKENS] == 8 * 96 / 2.0
    assert TOKENS not in scalars.at(16), "no time has passed"
    assert scalars.at(20)[TOKENS] == 4 * 96 / 4.0


def test_packed_documents_have_the_rate_alone():
    times = iter([1.0, 2.0])
    scalars = Scalars(extension(sample_unit="packed-documents"), clock=lambda: next(times))
    assert scalars.at(4) == {}
    assert scalars.at(8) == {TOKENS: 4 * 96}
