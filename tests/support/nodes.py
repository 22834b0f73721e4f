# SPDX-License-Identifier: Apache-2.0
"""Processes of a job on gloo, a node each, that run the preflight; for forks.call."""

import argparse
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from support import forks


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(world, job):
    """Return what ``job(rank, world, port)`` returns on each rank."""
    port = free_port()
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: forks.call(job, rank, world, port), range(world)))


def measured(rank, world, port):
    """Return the error of a preflight, or nothing."""
    import torch

    from megatron_cream.planning import preflight

    torch.cuda.is_available = lambda: False  # the CPU stands in for one where Megatron is loaded
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    place |= {"RANK": str(rank), "GROUP_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ.update(place, LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    try:
        preflight.run(argparse.Namespace(slow_below=0.5, seconds=5.0))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def slow_products(rank, world, port):
    """Node 2 multiplies at a third of the others' speed, whatever this host's is."""
    from megatron_cream.planning.preflight import Preflight

    Preflight.products = lambda self: 100.0 if self.rank == 2 else 300.0
    own = Preflight.reduce
    Preflight.reduce = lambda self, ranks: own(self, ranks) and 1.0
    return measured(rank, world, port)


def stuck(rank, world, port, which=1):
    """Node ``which`` does not come to an end."""
    from megatron_cream.planning.preflight import Preflight

    Preflight.products = lambda self: time.sleep(9) if self.rank == which else 300.0
    return measured(rank, world, port)


def stuck_first(rank, world, port):
    """The node that gathers what the others say does not come to an end."""
    return stuck(rank, world, port, 0)


def alone_of_two(port):
    """The other node does not come."""
    from megatron_cream.planning import preflight

    preflight.START_PATIENCE = 2.0
    return measured(0, 2, port)
