# SPDX-License-Identifier: Apache-2.0
"""Runs the units of a job as tasks of a Ray cluster.

Input and output are named by path, so every node must see both under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_cream.corpus.encode import UnitEncoder
from megatron_cream.corpus.job import Job
from megatron_cream.errors import UserError


def import_ray() -> Any:
    """Return the ray package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as exc:
        raise UserError("--ray: needs the ray package, run `pip install 'ray'`") from exc
    return ray


def run_on_ray(job: Job, units: list[int], address: str, on_bytes: Callable[[int], object]) -> None:
    """Make all parts of ``units`` on the cluster at ``address``, one CPU a unit.

    Args:
        job: the job.
        units: which of its units.
        address: as ``ray.init`` takes it: ``auto``, ``local``, ``ray://host:port``.
        on_bytes: called with bytes read from disk, a unit at a time.

    Raises:
        UserError, OSError: what a unit raised; the others are cancelled.
        ConnectionError: there is no cluster at ``address``.
    """
    ray = import_ray()
    own = not ray.is_initialized()
    if own:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_run_unit)
        shared = ray.put(job)
        waiting = {task.remote(shared, unit): unit for unit in units}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            ray.get(done)
            on_bytes(sum(job.unit_size(waiting.pop(reference)) for reference in done))
    except ray.exceptions.RayTaskError as exc:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if isinstance(exc.cause, (ValueError, OSError)):
            raise exc.cause from exc
        raise
    finally:
        if own:
            ray.shutdown()


_encoders: dict[str, UnitEncoder] = {}


def _run_unit(job: Job, unit: int) -> None:
    """Runs on a node; a worker process of the cluster keeps its tokenizer between units."""
    key = job.prefix + job.digest()
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = UnitEncoder(job)
    _encoders[key].run(unit)
