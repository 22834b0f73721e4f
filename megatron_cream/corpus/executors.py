# SPDX-License-Identifier: Apache-2.0
"""Runs the units of a job: here, in worker processes, or as tasks of a Ray cluster.

Workers never import megatron. Each takes the next unit when it is done with one, and what it made
is in the folder of parts, so nothing is sent back but the end of it. On a Ray cluster, input and
output are named by path, so every node must see both under the same name.

A process of one thread forks its workers: they have its libraries and its tokenizer at once, where
a fresh interpreter takes about a CPU second to load them. Any other process starts fresh ones.

This is not concurrent.futures, whose executor cannot stop units that are running when one fails,
does not end its workers when the parent is killed, and would send every unit through a queue,
where this process works on units itself and starts no thread that would keep it from forking.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import Any

from megatron_cream.corpus.encode import UnitEncoder
from megatron_cream.corpus.job import PreprocessJob
from megatron_cream.corpus.tokenizers import Tokenizer
from megatron_cream.errors import UserError

_POLL_SECONDS = 0.2
_PIPE_BYTES = 1 << 16  # what Linux takes into a pipe that nobody reads


def run_units(
    job: PreprocessJob,
    units: list[int],
    workers: int,
    on_bytes: Callable[[int], object],
    tokenizer: Tokenizer | None = None,
    on_fork: Callable[[], object] = lambda: None,
) -> None:
    """Make all parts of ``units``.

    Args:
        job: the job.
        units: which of its units.
        workers: processes, this one included.
        on_bytes: called with bytes read from disk.
        tokenizer: the job's, where this process has it loaded already.
        on_fork: called in a forked worker, to let go of what only this process may hold.

    Raises:
        ValueError, OSError: what a unit raised (see ``UnitEncoder.run``); other units are stopped.
        ChildProcessError: a worker died.
    """
    tokenizer = tokenizer or job.load_tokenizer()
    others = min(workers, len(units)) - 1
    with _Pool(_Inherited(job, units, tokenizer, on_fork), others, on_bytes) as pool:
        encoder = UnitEncoder(job, pool.count, tokenizer)
        while (unit := pool.take()) is not None:
            encoder.run(unit)
        pool.wait()


@dataclass(frozen=True)
class _Inherited:
    """What a forked worker gets from this process; a fresh one is sent the first two."""

    job: PreprocessJob
    units: list[int]
    tokenizer: Tokenizer
    on_fork: Callable[[], object]


class _Pool:
    """Worker processes that share a list of units with this one."""

    def __init__(
        self, inherited: _Inherited, others: int, on_bytes: Callable[[int], object]
    ) -> None:
        method = choose_start_method()
        context = get_context(method)
        given = inherited if method == "fork" else None
        self._units, self._on_bytes, self._shown = inherited.units, on_bytes, 0
        self._next, self._read = context.Value("q", 0), context.Value("q", 0)
        self._processes: dict[Any, Any] = {}
        try:
            for _ in range(others):
                self._start(context, given)
            for pipe in self._processes if given is None else ():
                _send(pipe, (inherited.job, inherited.units))
        except BaseException:
            self._kill()
            raise

    def _start(self, context: Any, given: _Inherited | None) -> None:
        ours, theirs = context.Pipe()
        arguments = (self._next, self._read, theirs, given)
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _short_command_line():
            process.start()
        theirs.close()
        self._processes[ours] = process

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill()

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()

    def take(self) -> int | None:
        """Return a unit that nobody has begun, None without one; look how the others do."""
        self._poll(timeout=0)
        with self._locked(self._next):
            return _take(self._units, self._next)

    def count(self, size: int) -> None:
        """Add to the bytes that all have read."""
        with self._locked(self._read):
            self._read.value += size
        self._report()

    @contextmanager
    def _locked(self, number: Any) -> Iterator[None]:
        """Hold the lock of a shared number; a worker that died with it is an error, not a wait."""
        while not number.get_lock().acquire(timeout=_POLL_SECONDS):
            self._poll(timeout=0)
        try:
            yield
        finally:
            number.get_lock().release()

    def wait(self) -> None:
        """Wait for the others, or stop at the first thing that is wrong."""
        while self._processes:
            self._poll(_POLL_SECONDS)
            self._report()

    def _poll(self, timeout: float) -> None:
        for pipe in connection.wait(list(self._processes), timeout=timeout):
            try:
                error = pipe.recv()
            except (EOFError, ConnectionError):
                raise _died() from None
            if error is not None:
                raise error
            self._processes.pop(pipe).join()

    def _report(self) -> None:
        read = self._read.value
        self._on_bytes(read - self._shown)
        self._shown = read


def _died() -> ChildProcessError:
    return ChildProcessError(
        "--workers: a worker died, needs more memory or fewer workers (and, in a script of your "
        'own, the call under `if __name__ == "__main__":`)'
    )


def _send(pipe: Any, content: object) -> None:
    """Send a worker what it works on; one that died while it started takes nothing.

    Arguments of a process would do too, but multiprocessing writes those of a fresh interpreter to
    a pipe of which this process holds the other end, and waits for ever when nobody empties it.
    """
    try:
        pipe.send(content)
    except ConnectionError:
        raise _died() from None


@contextmanager
def _short_command_line() -> Iterator[None]:
    """Keep a long command line, of thousands of files, out of the same pipe (see ``_send``)."""
    before = sys.argv
    if sum(map(len, before)) > _PIPE_BYTES // 8:
        sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def choose_start_method() -> str:
    """Return ``fork`` where this process has one thread, which copies of it then have too.

    A copy of a process with more has none of the others, and hangs at the first lock that one of
    them held. Where threads cannot be counted there may be some.
    """
    try:
        return "fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn"
    except OSError:
        return "spawn"


def _work(next_unit: Any, read: Any, pipe: Any, inherited: _Inherited | None) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if inherited is not None:
        inherited.on_fork()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    try:
        if inherited is None:
            (job, units), tokenizer = pipe.recv(), None
        else:
            job, units, tokenizer = inherited.job, inherited.units, inherited.tokenizer
        encoder = UnitEncoder(job, lambda size: _count(read, size), tokenizer)
        while (unit := _take(units, next_unit)) is not None:
            encoder.run(unit)
        pipe.send(None)
    except (ValueError, OSError) as exc:
        pipe.send(exc)


def _take(units: list[int], next_unit: Any) -> int | None:
    with next_unit.get_lock():
        at = next_unit.value
        next_unit.value = at + 1
    return units[at] if at < len(units) else None


def _count(read: Any, size: int) -> None:
    with read.get_lock():
        read.value += size


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise go on writing parts."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


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
    job: PreprocessJob, units: list[int], address: str, on_bytes: Callable[[int], object]
) -> None:
    """Make all parts of ``units`` on the cluster at ``address``, one CPU per unit.

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


def _run_unit(job: PreprocessJob, unit: int) -> None:
    """Runs on a node; a worker process of the cluster keeps its tokenizer between units."""
    key = job.prefix + job.digest()
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = UnitEncoder(job)
    _encoders[key].run(unit)
