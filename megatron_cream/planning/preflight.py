# SPDX-License-Identifier: Apache-2.0
"""Measures each node of a job before it trains, and names the one that is slow.

A training step is as fast as its slowest GPU and its slowest link. In half a minute every GPU
multiplies matrices, every node adds a buffer up over its GPUs, and pairs of nodes add it up over
theirs. A node that is slow is slow with each of its partners, and its partners are not; so the best
of a node's pairs counts.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from megatron_cream.errors import UserError
from megatron_cream.planning.cost import GPUS, product_share, ring_speed

if TYPE_CHECKING:
    import torch

EXAMPLES = """
    torchrun --nnodes 4 --node-rank $NODE --nproc-per-node 8 --master-addr $HEAD \\
        -m megatron_cream preflight

Start it as the training run is started, on all of its nodes: PREFLIGHT=1 does in a launch script.
It names a node that is slow or does not answer, and ends in an error.
"""

ROUNDS = 3
"""Partners of each node: one of them may be slow itself, or its path to this node busy."""

START_PATIENCE = 600.0
"""Seconds until all processes have to be there: torch comes slowly from a busy file system."""

_REPEATS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    below = "share of the median below which a node is slow (default: 0.85)"
    add("--slow-below", type=float, default=0.85, metavar="SHARE", help=below)
    patience = "that each measurement may take (default: 30)"
    add("--seconds", type=float, default=30.0, metavar="S", help=patience)


@dataclass(frozen=True)
class Speeds:
    """What one process measured.

    Attributes:
        node: name of its node.
        gpu: its number in the node.
        products: TFLOP/s of matrix products.
        within: bus bandwidth of an all-reduce over its node in GB/s, None where it is alone.
        between: the best one over this node and another, None without another.
    """

    node: str
    gpu: int
    products: float
    within: float | None
    between: float | None


def run(args: argparse.Namespace) -> None:
    """Measure, and print a line per node on rank 0.

    Raises:
        UserError: a node is slow, does not answer, or has not come.
    """
    import torch
    from torch import distributed

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=START_PATIENCE))
        preflight = Preflight(device, args.seconds)
    except RuntimeError as error:
        head, world = os.environ["MASTER_ADDR"], os.environ["WORLD_SIZE"]
        raise UserError(
            f"MASTER_ADDR is {head}: {world} processes must meet there in {START_PATIENCE:g} s, "
            "each node started and reached by the interface that GLOO_SOCKET_IFNAME names"
        ) from error
    found = preflight.measure()
    if distributed.get_rank() == 0:
        print("\n".join(lines(found, _kind(device))), flush=True)
    distributed.destroy_process_group()  # not where a node hangs: it would wait for that one
    slow = slow_parts(found, args.slow_below)
    if slow:
        raise UserError("; ".join(slow))


class Preflight:
    """The measurements of one process; all processes of the job make them together.

    Args:
        device: a GPU of this node, or the CPU.
        seconds: that one of them may take.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        from torch import distributed

        self.device, self.seconds = device, seconds
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.gpu = int(os.environ.get("LOCAL_RANK", "0"))
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.node_index = int(os.environ.get("GROUP_RANK", "0"))
        self.places: list[tuple[int, str]] = self._gather((self.node_index, host))
        hosts = dict(self.places)
        twice = len(set(hosts.values())) < len(hosts)
        self.names = {n: f"{host}:{n}" if twice else host for n, host in hosts.items()}

    def measure(self) -> list[Speeds]:
        """Return the speeds of all processes, by rank."""
        products = self._finish("matrix products", self.products)
        own = [rank for rank, (node, _) in enumerate(self.places) if node == self.node_index]
        within = self._finish("all-reduce within nodes", partial(self.reduce, own))
        between: list[float | None] = []
        for pairs in rounds(sorted(self.names)):
            ranks = self._partners(pairs)
            between.append(self._finish("all-reduce of two nodes", partial(self.reduce, ranks)))
        best = max((speed for speed in between if speed is not None), default=None)
        speeds = Speeds(self.names[self.node_index], self.gpu, products, within, best)
        return self._gather(speeds)

    def _partners(self, pairs: Sequence[tuple[int, int]]) -> list[int]:
        """Return the ranks of this node and of its partner; none where it has none now."""
        pair = next((pair for pair in pairs if self.node_index in pair), ())
        return [rank for rank, (node, _) in enumerate(self.places) if node in pair]

    def products(self) -> float:
        """Return the TFLOP/s of products of square matrices: bf16, fp32 on the CPU."""
        import torch

        gpu = self.device.type == "cuda"
        size, dtype, least = (8192, torch.bfloat16, 2.0) if gpu else (512, torch.float32, 0.2)
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        b = torch.randn(size, size, device=self.device, dtype=dtype)
        out = torch.mm(a, b)
        self._wait()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < least:  # long enough to get warm
            for _ in range(10):
                torch.mm(a, b, out=out)
            self._wait()
            count += 10
        return 2.0 * size**3 * count / (time.perf_counter() - begin) / 1e12

    def reduce(self, ranks: Sequence[int]) -> float | None:
        """Return the bus bandwidth of an all-reduce over ``ranks`` in GB/s, as nccl-tests do."""
        import torch
        from torch import distributed

        # Names of groups have a number in them that all processes must count alike: whoever has no
        # partner makes one of itself. NCCL ends a process after its time-out, which has to come
        # after the word of who is late.
        members = list(ranks) or [self.rank]
        gpu = self.device.type == "cuda"
        group: Any = distributed.new_group(
            members,
            timeout=timedelta(seconds=3 * self.seconds),
            backend="nccl" if gpu else "gloo",
            use_local_synchronization=True,
        )
        if len(members) < 2:
            return None
        buffer = torch.zeros(2**27 if gpu else 2**20, device=self.device, dtype=torch.bfloat16)
        distributed.all_reduce(buffer, group=group)
        self._wait()
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            distributed.all_reduce(buffer, group=group)
        self._wait()
        seconds = (time.perf_counter() - begin) / _REPEATS
        return 2 * (len(ranks) - 1) / len(ranks) * buffer.nbytes / seconds / 1e9

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish(self, what: str, measure: Callable[[], Any]) -> Any:
        """Measure, and wait for all others.

        Raises:
            UserError: a node does not come to an end; rank 0 names it.
        """
        from torch import distributed

        late: set[str] = set()
        try:
            found = self._in_time(measure)
        except TimeoutError:
            late.add(self.names[self.node_index])
        if self.rank and late:  # the others see it go
            raise UserError(self._too_late(what, late))
        # Rank 0 may be late itself, and speaks after that.
        patience = timedelta(seconds=self.seconds * (3 if self.rank else 1))
        try:
            distributed.monitored_barrier(timeout=patience, wait_all_ranks=True)
        except RuntimeError as error:
            ranks = re.search(r"Ranks? ([\d, ]+) failed", str(error))
            if self.rank or ranks is None:
                raise UserError(
                    f"{what}: a node did not come to an end within {self.seconds:g} s, rank 0 "
                    "names it"
                ) from error
            late |= {self.names[self.places[int(rank)][0]] for rank in ranks[1].split(",")}
            raise UserError(self._too_late(what, late)) from error
        if any(self._gather(bool(late))):  # rank 0 is
            raise UserError(self._too_late(what, {self.names[self.places[0][0]]}))
        return found

    def _in_time(self, measure: Callable[[], Any]) -> Any:
        """Return what is measured; what hangs in NCCL or on the GPU stays behind in a thread."""
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(measure())
            except Exception as error:
                future.set_exception(error)

        Thread(target=work, daemon=True).start()
        return future.result(self.seconds)

    def _too_late(self, what: str, nodes: set[str]) -> str:
        names = ", ".join(sorted(nodes))
        return f"{what}: node {names} did not come to an end within {self.seconds:g} s"

    def _gather(self, value: Any) -> list[Any]:
        from torch import distributed

        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found


def rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return pairs of nodes, ``ROUNDS`` times or as often as there are others to meet.

    All nodes but the first move on by one place each round, as in a tournament, so that nobody
    meets the same one twice; of an odd number one has nobody.
    """
    places: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    found = []
    for _ in range(min(ROUNDS, len(places) - 1) if len(nodes) > 1 else 0):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(a, b) for a, b in met if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


_UNITS = {
    "products": ("matrix products", "TFLOP/s"),
    "within": ("all-reduce within the node", "GB/s"),
    "between": ("all-reduce with another node", "GB/s"),
}


def slow_parts(speeds: Sequence[Speeds], below: float) -> list[str]:
    """Return a line for each node that is below a share of the median, naming the GPU or the link.

    Of two nodes the faster one is the measure; links to others tell two nodes apart no more.
    """
    lines = []
    for field, (what, unit) in _UNITS.items():
        known = [one for one in speeds if getattr(one, field) is not None]
        if not known:
            continue
        median = statistics.median_high(getattr(one, field) for one in known)
        slowest: dict[str, Speeds] = {}
        for one in sorted(known, key=lambda one: -getattr(one, field)):
            slowest[one.node] = one
        for node, one in slowest.items():
            value = getattr(one, field)
            if value < below * median:
                where = f" on its GPU {one.gpu}" if field == "products" else ""
                lines.append(
                    f"node {node} is slow: {what} at {value:.3g} {unit}{where}, the median is "
                    f"{median:.3g}"
                )
    return lines


def lines(speeds: Sequence[Speeds], kind: str | None) -> list[str]:
    """Return a line for each node: its slowest GPU, and its links; and what plans count on."""
    found = []
    for node in dict.fromkeys(one.node for one in speeds):
        own = [one for one in speeds if one.node == node]
        parts = []
        for field, (what, unit) in _UNITS.items():
            values = [getattr(one, field) for one in own if getattr(one, field) is not None]
            parts += [f"{what} {min(values):.3g} {unit}"] if values else []
        found.append(f"node {node}, {len(own)} processes: {', '.join(parts)}")
    if kind is not None:
        gpu = GPUS[kind]
        gpus = max(Counter(one.node for one in speeds).values())
        links = [f"{ring_speed(gpu, 1, ranks, gpus) / 1e9:.3g}" for ranks in (gpus, 2 * gpus)]
        found.append(
            f"plans for {kind} count on: matrix products {product_share() * gpu.tflops:.3g} "
            f"TFLOP/s, all-reduce within the node {links[0]} GB/s, with another node {links[1]}"
        )
    return found


def _kind(device: torch.device) -> str | None:
    from megatron_cream.training.progress import kind_of_gpu

    return kind_of_gpu() if device.type == "cuda" else None
