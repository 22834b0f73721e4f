# SPDX-License-Identifier: Apache-2.0
"""The slow node of a job is found: by what is measured, and by real processes on gloo."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from support import forks, nodes

from megatron_cream.planning import preflight
from megatron_cream.planning.preflight import Speeds, rounds, slow_parts

GOOD = [Speeds(f"n{node}", gpu, 600.0, 320.0, 300.0) for node in range(4) for gpu in range(8)]


def changed(node, gpus, **values):
    return [replace(s, **values) if s.node == node and s.gpu in gpus else s for s in GOOD]


def test_nothing_is_slow_among_equals():
    assert slow_parts(GOOD, 0.85) == []
    assert slow_parts([replace(s, products=600 - s.gpu) for s in GOOD], 0.85) == []


@pytest.mark.parametrize(
    ("node", "gpus", "values", "said"),
    [
        ("n2", [5], {"products": 400.0}, "matrix products at 400 TFLOP/s on its GPU 5, the median"),
        ("n1", range(8), {"within": 150.0}, "all-reduce within the node at 150 GB/s"),
        ("n3", range(8), {"between": 40.0}, "all-reduce with another node at 40 GB/s"),
    ],
)
def test_the_slow_node_is_named(node, gpus, values, said):
    [line] = slow_parts(changed(node, gpus, **values), 0.85)
    assert line.startswith(f"node {node} is slow: {said}")


def test_of_two_nodes_the_faster_one_is_the_measure():
    two = [s for s in changed("n1", range(8), products=450.0) if s.node in ("n0", "n1")]
    [line] = slow_parts(two, 0.85)
    assert "node n1" in line


@pytest.mark.parametrize("count", range(1, 12))
def test_nodes_meet_each_other_at_most_once(count):
    found = rounds(range(count))
    others = count if count % 2 else count - 1
    assert len(found) == (min(preflight.ROUNDS, others) if count > 1 else 0)
    pairs = [pair for one in found for pair in one]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    for one in found:
        met = [node for pair in one for node in pair]
        assert len(set(met)) == len(met) >= count - 1


@pytest.mark.parametrize("count", [3, 4, 7, 8])
def test_a_slow_link_spoils_no_partner(count):
    """The best of a node's pairs counts, so a node is slow only where all of its pairs are."""
    best = dict.fromkeys(range(count), 0.0)
    for a, b in (pair for one in rounds(range(count)) for pair in one):
        rate = 40.0 if 1 in (a, b) else 300.0
        best[a], best[b] = max(best[a], rate), max(best[b], rate)
    assert [node for node, rate in best.items() if rate < 100] == [1]


def test_processes_agree_on_the_slow_node():
    said = nodes.call(3, nodes.slow_products)
    assert len(set(said)) == 1, said
    assert re.match(r"node \S+:2 is slow: matrix products at 100 TFLOP/s", said[0])


def test_a_node_that_does_not_come_to_an_end_is_named():
    said = nodes.call(2, nodes.stuck)
    assert re.match(r"matrix products: node \S+:1 did not come to an end within 5 s", said[0]), said


def test_the_first_node_is_named_as_others_are():
    said = nodes.call(2, nodes.stuck_first)
    assert len(set(said)) == 1
    assert re.match(r"matrix products: node \S+:0 did not come to an end within 5 s", said[0]), said


def test_a_node_that_does_not_come_is_waited_for_and_said():
    said = forks.call(nodes.alone_of_two, nodes.free_port())
    assert said.startswith("MASTER_ADDR is 127.0.0.1: 2 processes must meet there in 2 s"), said


@pytest.mark.parametrize(("gpus", "between"), [(8, "315"), (4, "160"), (1, "40")])
def test_links_are_said_as_all_reduce_measures_them(gpus, between):
    """Bus bandwidth over two nodes counts all their network cards, as nccl-tests do."""
    said = preflight.lines([s for s in GOOD if s.gpu < gpus], "h100")[-1]
    assert said.endswith(f"all-reduce within the node 315 GB/s, with another node {between}")


def test_alone_it_measures_itself():
    assert nodes.call(1, nodes.measured) == [""]


@pytest.mark.slow
def test_the_command_under_torchrun():
    port, started = str(nodes.free_port()), []
    for node in "01":
        own = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
        own += ["--master-addr", "127.0.0.1", "--master-port", port, "--local-addr", "127.0.0.1"]
        command = ["-m", "torch.distributed.run", *own, "-m", "megatron_cream", "preflight"]
        started.append(
            subprocess.Popen(
                [sys.executable, *command, "--slow-below", "0.001"],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert len(re.findall(r"^node .*all-reduce with another node", said, re.M)) == 2
