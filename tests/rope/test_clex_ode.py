# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE: closed form, another solver on the published equation, gradients, error of a step."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import approx_fprime
from support.commands import load_file

from megatron_cream.extras.clex.ode import VectorField, grid, limits, solve
from megatron_cream.rope import make_scaling


def trained(field, std=0.02, seed=1):
    weights = initial(field)
    down = field.split(weights)[1]
    down[:] = np.random.default_rng(seed).normal(scale=std, size=down.shape)
    return weights


def initial(field):
    return field.initial().double().numpy()


def log_stretch(field, weights, scales):
    return solve(field, weights, scales).log_stretch


def frequencies(field, stretch):
    constants, _ = field.constants()
    return np.exp(constants - stretch)


@pytest.mark.parametrize("dim", [4, 16, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_weights_of_zero_are_ntk_by_2t_minus_1(dim, base):
    field = VectorField(dim, base)
    scales = [*map(float, range(1, 65)), 64.5]
    found = frequencies(field, log_stretch(field, initial(field), scales))
    for t, row in zip(scales, found, strict=True):
        ntk = make_scaling("ntk", dim=dim, base=base, factor=2 * t - 1, original_length=4096)
        np.testing.assert_allclose(row, ntk.inv_freq, rtol=1e-12)


def published(field, weights, scales):
    """ln theta at ``scales`` by scipy, on the whole equation as the paper's code has it."""
    up, down = field.split(weights)
    pairs = np.arange(0, field.dim, 2)
    base = -pairs / field.dim * math.log(field.base)
    act = {"tanh": np.tanh, "silu": lambda x: x / (1 + np.exp(-x))}[field.act]

    def rate(t, z):
        alpha = 2 * t - 1
        ntk = base - pairs / (field.dim - 2) * math.log(alpha)
        return act((z + ntk) @ up) @ down - 2 * pairs / ((field.dim - 2) * alpha)

    span = (1.0, scales[-1])
    return solve_ivp(rate, span, base, "DOP853", scales, rtol=1e-11, atol=1e-11).y.T


@pytest.mark.parametrize("act", ["tanh", "silu"])
@pytest.mark.parametrize(("width", "base"), [(1, 10000.0), (2, 500000.0)])
def test_same_as_another_solver_on_the_published_equation(act, width, base):
    field = VectorField(64, base, width, act, step=0.02)
    weights, scales = trained(field), [1.0, 2.0, 3.0, 5.5, 8.0]
    expected = published(field, weights, scales)
    constants, _ = field.constants()
    found = constants - log_stretch(field, weights, scales)
    assert np.abs(expected - expected[0]).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def benchmark():
    """tools/benchmark_ode.py as a module."""
    path = Path(__file__).parents[2] / "tools" / "benchmark_ode.py"
    return load_file(path)


@pytest.mark.parametrize("act", ["tanh", "silu"])
@pytest.mark.parametrize(("width", "step"), [(1, 0.5), (2, 0.1)])
def test_steps_and_their_reverse_are_torchdiffeqs(act, width, step):
    """Same rule, same grid: to rounding, the gradient too."""
    field, scales = VectorField(32, 10000.0, width, act, step), [1.0, 2.0, 3.0, 6.5]
    weights, upstream = trained(field, std=0.1), np.random.default_rng(2).normal(size=(4, 16))
    solved = solve(field, weights, scales)
    expected, expected_gradient = benchmark().recorded(field, weights, scales, upstream)
    assert np.abs(expected_gradient).max() > 1
    np.testing.assert_allclose(solved.log_stretch, expected, rtol=1e-12, atol=1e-12)
    found = solved.pull_back(upstream)
    np.testing.assert_allclose(found, expected_gradient, rtol=1e-12, atol=1e-12)


def test_weights_matter():
    field = VectorField(128, 10000.0)
    zero = log_stretch(field, initial(field), [8.0])
    assert np.abs(log_stretch(field, trained(field), [8.0]) - zero).max() > 0.1


def solution_and_gradient(step, scales=16):
    field = VectorField(128, 10000.0, step=step)
    solved = solve(field, trained(field), [float(t) for t in range(1, scales + 1)])
    upstream = np.random.default_rng(2).normal(size=solved.log_stretch.shape)
    return solved.log_stretch, solved.pull_back(upstream)


def test_the_default_step_is_more_exact_than_the_published_path():
    """The published fixed step of 0.01 in float32 is 2e-5 off in ln theta at t = 16."""
    exact, exact_gradient = solution_and_gradient(0.02)
    found, gradient = solution_and_gradient(VectorField(128, 10000.0).step)
    assert 0 < np.abs(found - exact).max() < 1e-5
    assert np.linalg.norm(gradient - exact_gradient) < 1e-5 * np.linalg.norm(exact_gradient)


@pytest.mark.parametrize("act", ["tanh", "silu"])
def test_gradient_is_the_solutions_own(act):
    field = VectorField(8, 10000.0, act=act)
    weights, scales = trained(field, std=0.3), [1.0, 2.0, 3.5]
    upstream = np.random.default_rng(2).normal(size=(3, 4))
    slopes = approx_fprime(
        weights, lambda w: (log_stretch(field, w, scales) * upstream).sum(), 1e-7
    )
    found = solve(field, weights, scales).pull_back(upstream)
    np.testing.assert_allclose(found, slopes, atol=1e-5 * np.abs(slopes).max())


def test_grid_has_every_scale_and_no_step_too_long():
    scales, step = [1.0, 2.0, 3.0, 4.0, 4.3, 9.0], 0.1
    points = grid(scales, step)
    assert set(scales) <= set(points)
    assert points == sorted(set(points))
    for low, high in zip(points, points[1:], strict=False):
        assert high - low <= min(1.0, step * (2 * low - 1)) + 1e-12


def test_one_scale_alone_is_that_of_the_table():
    field = VectorField(32, 10000.0)
    weights = trained(field)
    table = log_stretch(field, weights, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(log_stretch(field, weights, [4.0])[0], table[3], atol=1e-6)
    assert (log_stretch(field, weights, [1.0]) == 0).all()


def test_initial_weights_are_the_same_everywhere():
    torch.manual_seed(0)
    first = VectorField(64, 10000.0).initial()
    torch.manual_seed(7)
    assert torch.equal(first, VectorField(64, 500000.0).initial())
    up, down = VectorField(64, 10000.0).split(first)
    assert (down == 0).all()
    assert 0.9 < up.abs().max() * math.sqrt(32) <= 1


def test_limits_are_half_a_turn_a_token():
    low, high = limits(VectorField(16, 10000.0))
    fastest = np.exp(VectorField(16, 10000.0).constants()[0] - low)
    np.testing.assert_allclose(fastest, math.pi)
    assert 0 < np.float32(np.exp(-high)) < 1e-30


def test_the_benchmark_names_the_package_that_it_lacks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(SystemExit) as ended:
        benchmark().main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: torchdiffeq is not installed")
