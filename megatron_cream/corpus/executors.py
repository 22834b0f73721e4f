# SPDX-License-Identifier: Apache-2.0
"""Runs the units of a job in several processes, or as tasks of a Ray cluster.

Workers never import megatron. What they make is in the folder of parts, so nothing is sent back but
the end of a unit. On a Ray cluster, input and output are named by path, so every node must see both
under the same name.

A process of one thread forks its workers: they have its libraries and its tokenizer at once, where
a fresh interpreter takes about a CPU second to load them. Any other process starts fresh ones.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_cream.corpus.encode import UnitEncoder
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.errors import UserError

_POLL_SECONDS = 0.2
_RAY_AHEAD = 16  # units in flight beside two per CPU of the cluster
_PIPE_BYTES = 1 << 16  # what Linux takes into a pipe that nobody reads


def run_in_pool(
    job: PreprocessJob,
    units: Iterable[int],
    workers: int,
    on_bytes: Callable[[int], object],
    tokenizer: Tokenizer | None = None,
    on_fork: Callable[[], object] = lambda: None,
) -> None:
    """Make all parts of ``units`` in some processes of this machine.

    Args:
        job: the job.
        units: which of its units.
        workers: processes.
        on_bytes: called with bytes read from disk.
        tokenizer: the job's, where this process has it loaded already.
        on_fork: called in a forked worker, to release what only this process may hold.

    Raises:
        ValueError, OSError: what a unit raised (see ``UnitEncoder.run``); other units are stopped.
        ChildProcessError: a worker died.
    """
    method = choose_start_method()
    context = get_context(method)
    read, shown, todo = context.Value("q", 0), 0, iter(units)
    # Workers end when its other end is closed: by this process, or because it was killed.
    watched, alive = context.Pipe(duplex=False)

    def inherit() -> tuple[PreprocessJob, Tokenizer | None]:
        alive.close()
        on_fork()
        return job, tokenizer

    load = inherit if method == "fork" else partial(_read_job, _write_job(job))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (read, watched, load))
    with alive, watched, pool, _short_command_line():
        try:
            waiting = {pool.submit(_run_in_worker, unit) for unit in islice(todo, 2 * workers)}
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                waiting |= {pool.submit(_run_in_worker, unit) for unit in islice(todo, len(done))}
                # Without its lock, which a worker that died may have.
                total = read.get_obj().value
                on_bytes(total - shown)
                shown = total
        except BaseException as exc:
            alive.close()  # ends what is running, and the pool need not wait for it
            if isinstance(exc, BrokenProcessPool):
                raise ChildProcessError(
                    "--workers: a worker died, needs more memory or fewer workers (and, in a "
                    'script of your own, the call under `if __name__ == "__main__":`)'
                ) from None
            raise


def choose_start_method() -> str:
    """Return ``fork`` where this process has one thread, which copies of it then have too.

    A copy of a process with more has none of the others, and hangs at the first lock that one of
    them held. Where threads cannot be counted there may be some.
    """
    try:
        return "fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn"
    except OSError:
        return "spawn"


def _write_job(job: PreprocessJob) -> Path:
    """Write the job for fresh workers.

    As an argument multiprocessing would write it to a pipe of which this process holds the other
    end, and wait for ever where a worker dies before it reads a job that is larger than the pipe.
    """
    path = job.folder / "job.pickle.tmp"
    path.write_bytes(pickle.dumps(job))
    return path


def _read_job(path: Path) -> tuple[PreprocessJob, None]:
    return pickle.loads(path.read_bytes()), None


@contextmanager
def _short_command_line() -> Iterator[None]:
    """Keep a long command line, of thousands of files, out of that pipe (see ``_write_job``)."""
    before = sys.argv
    if sum(map(len, before)) > _PIPE_BYTES // 8:
        sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


_encoder: UnitEncoder | None = None


def _start_worker(
    read: Any, watched: Any, load: Callable[[], tuple[PreprocessJob, Tokenizer | None]]
) -> None:
    global _encoder
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    job, tokenizer = load()
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = UnitEncoder(job, partial(_count, read), tokenizer)


def _end_with(watched: Any) -> None:
    """End this worker when its parent closes the pipe, or is killed."""
    watched.poll(None)
    os._exit(1)


def _count(read: Any, size: int) -> None:
    with read.get_lock():
        read.value += size


def _run_in_worker(unit: int) -> None:
    assert _encoder is not None
    _encoder.run(unit)


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Keep one worker to one core: the tokenizers library takes them all if it is not told."""
    key = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(key)
    os.environ[key] = "false"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


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


def run_on_ray(
    job: PreprocessJob, units: dict[int, int], address: str, on_bytes: Callable[[int], object]
) -> None:
    """Make all parts of ``units`` on the cluster at ``address``, one CPU per unit.

    Args:
        job: the job.
        units: which of its units, and the bytes that each reads.
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
        task = ray.remote(num_cpus=1, max_retries=3)(_run_on_node)
        shared = ray.put(job)
        waiting: dict[Any, int] = {}
        todo = iter(units)
        while True:
            # The scheduler holds what is submitted; a cluster that can grow sees why it should.
            room = 2 * int(ray.cluster_resources().get("CPU", 0)) + _RAY_AHEAD - len(waiting)
            waiting |= {task.remote(shared, unit): unit for unit in islice(todo, max(room, 0))}
            if not waiting:
                break
            done, _ = ray.wait(list(waiting), num_returns=1)
            ray.get(done)
            on_bytes(sum(units[waiting.pop(reference)] for reference in done))
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


def _run_on_node(job: PreprocessJob, unit: int) -> None:
    """Runs on a node; a worker process of the cluster keeps its tokenizer between units."""
    key = job.prefix + job.digest()
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = UnitEncoder(job)
    _encoders[key].run(unit)
