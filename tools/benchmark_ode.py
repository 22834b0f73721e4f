# SPDX-License-Identifier: Apache-2.0
"""Measure the solution of CLEX's ODE and its gradient beside torchdiffeq recorded by autograd.

    python tools/benchmark_ode.py --scales 16 64

Same rule, same steps, same float64, in turns on one thread; medians in milliseconds, the ratio, and
the largest relative difference of solution and gradient. Where there is a GPU, another column has
the same solution and gradient of weights that are there, from the call to the end of its work, in
the same turns. Needs torchdiffeq.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.errors import MissingPackageError, one_line_errors
from megatron_cream.extras.clex import ode_triton
from megatron_cream.extras.clex.ode import VectorField, grid, solve

Result = tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]


def main(argv: list[str]) -> int:
    """Print a row for each number of scales; bad input ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dim", type=int, default=128, help="d, of a head (default: 128)")
    add("--scales", type=int, nargs="+", default=[8, 16, 64], help="T / N0 (default: 8 16 64)")
    add("--act", choices=("tanh", "silu"), default="tanh", help="activation (default: tanh)")
    add("--turns", type=int, default=20, help="of each side (default: 20)")
    args = parser.parse_args(argv)
    with one_line_errors():
        torchdiffeq()
    torch.set_num_threads(1)
    field = VectorField(args.dim, 10000.0, act=args.act)
    heads = ["T / N0", "torchdiffeq, ms", "ours, ms", "ratio", "difference"]
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}\n")
        heads.insert(3, "ours on the GPU, ms")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for count in args.scales:
        print(_row(field, [float(t) for t in range(1, count + 1)], args.turns))
    return 0


def torchdiffeq() -> Any:
    """Return the package that this measures beside.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import torchdiffeq
    except ImportError:
        raise MissingPackageError(
            "torchdiffeq is not installed: this measures beside it; pip install torchdiffeq"
        ) from None
    return torchdiffeq


def recorded(
    field: VectorField, weights: np.ndarray, scales: list[float], upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``log_stretch`` and the weights' gradient by torchdiffeq; ``scales`` begin at 1."""
    leaf = torch.from_numpy(weights).requires_grad_()
    up, down = field.split(leaf)
    act = {"tanh": torch.tanh, "silu": torch.nn.functional.silu}[field.act]
    c, e = (torch.from_numpy(x) for x in field.constants())
    constant, falling = (2.0 * c) @ up, (2.0 * e) @ up

    def slope(t: Tensor, w: Tensor) -> Tensor:
        known = torch.sub(constant, falling, alpha=math.log(2.0 * float(t) - 1.0))
        return act(torch.addmv(known, up.t(), w)) @ down

    points = torch.tensor(grid(scales, field.step), dtype=torch.float64)
    learned = torchdiffeq().odeint(
        slope,
        torch.zeros(field.dim // 2, dtype=torch.float64),
        torch.tensor(scales, dtype=torch.float64),
        method="rk4",
        options={"grid_constructor": lambda func, y0, t: points},
    )
    alpha = 2.0 * torch.tensor(scales, dtype=torch.float64) - 1.0
    stretch = torch.log(alpha)[:, None] * e - learned
    (gradient,) = torch.autograd.grad(stretch, leaf, torch.from_numpy(upstream))
    return stretch.detach().numpy(), gradient.numpy()


def ours(
    field: VectorField, weights: np.ndarray, scales: list[float], upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same by this package."""
    solved = solve(field, weights, scales)
    return solved.log_stretch, solved.pull_back(upstream)


def ours_on_gpu(
    field: VectorField, weights: Tensor, scales: list[float], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same of tensors on a GPU, when it is done."""
    solved = ode_triton.solve(field, weights, scales)
    gradient = solved.pull_back(upstream)
    torch.cuda.synchronize()
    return solved.log_stretch, gradient


def _row(field: VectorField, scales: list[float], turns: int) -> str:
    rng = np.random.default_rng(1)
    weights = field.initial().double().numpy()
    down = field.split(weights)[1]
    down[:] = rng.normal(scale=0.02, size=down.shape)
    upstream = rng.normal(size=(len(scales), field.dim // 2))
    runs: dict[str, Callable[[], Result]] = {
        "theirs": lambda: recorded(field, weights, scales, upstream),
        "ours": lambda: ours(field, weights, scales, upstream),
    }
    if torch.cuda.is_available():
        there, upstream_there = (torch.from_numpy(array).cuda() for array in (weights, upstream))
        runs["on the GPU"] = lambda: ours_on_gpu(field, there, scales, upstream_there)
    times, found = _measure(runs, turns)
    difference = max(
        np.linalg.norm(b - a) / np.linalg.norm(a)
        for name in runs
        for a, b in zip(found["theirs"], map(_on_host, found[name]), strict=True)
    )
    cells = [f"{scales[-1]:g}", *(f"{times[name]:.2f}" for name in runs)]
    cells += [f"{times['theirs'] / times['ours']:.1f}", f"{difference:.1e}"]
    return f"| {' | '.join(cells)} |"


def _on_host(values: np.ndarray | Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _measure(
    runs: dict[str, Callable[[], Result]], turns: int
) -> tuple[dict[str, float], dict[str, Result]]:
    """Return the median milliseconds of each run, in turns, and what it found."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    found = {}
    for turn in range(-1, turns):  # the first warms up, and compiles
        for name, run in runs.items():
            began = time.perf_counter()
            found[name] = run()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}, found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
