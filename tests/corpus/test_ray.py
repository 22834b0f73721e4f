# SPDX-License-Identifier: Apache-2.0
"""The same job on a Ray cluster of this machine; skipped where ray, an extra, is not installed."""

import importlib.util
from pathlib import Path

import pytest

PARTS = {"part_bytes": 400}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_is_asked_for_before_any_work(job, run, left_in):
    with pytest.raises(ValueError, match="--ray: needs the ray package, run `pip install"):
        run(job, ray="auto")
    assert left_in(job) == []


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the optional ray package is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "auto"
    ray.shutdown()


def test_same_bytes_on_a_cluster(job, run, outputs, cluster):
    run(job)
    prefix = job.output_prefix + "-ray"
    run(job, output_prefix=prefix, ray=cluster, **PARTS)
    assert outputs(prefix) == outputs(job.output_prefix)


def test_bad_line_ends_the_job(job, run, cluster):
    with open(job.input[0], "a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"in\.jsonl: line 16: broken JSON"):
        run(job, ray=cluster, **PARTS)
    assert not Path(job.output_prefix + ".idx").exists()


def test_few_units_are_in_flight_at_once(monkeypatch):
    """Of a hundred thousand a cluster of four CPUs is given what keeps it at work."""
    from types import SimpleNamespace

    from megatron_cream.corpus import executors

    flying, most, done = set(), [0], []

    def remote(job, unit):
        flying.add(unit)
        most[0] = max(most[0], len(flying))
        return unit

    def wait(references, num_returns):
        return sorted(references)[:num_returns], None

    def get(references):
        flying.difference_update(references)
        done.extend(references)

    ray = SimpleNamespace(
        **{"is_initialized": lambda: True, "put": lambda job: job, "wait": wait, "get": get},
        remote=lambda **_: lambda function: SimpleNamespace(remote=remote),
        cluster_resources=lambda: {"CPU": 4.0},
        exceptions=SimpleNamespace(RayTaskError=ZeroDivisionError),
    )
    monkeypatch.setattr(executors, "import_ray", lambda: ray)
    sizes = []
    executors.run_on_ray(None, dict.fromkeys(range(1000), 3), "auto", sizes.append)
    assert done == list(range(1000)) and sum(sizes) == 3000
    assert most[0] == 2 * 4 + executors._RAY_AHEAD
