# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE: closed form, another solver on the published equation, gradients, error of a step."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from megatron_cream.rope import make_scaling
from megatron_cream.rope.clex.ode import Field, grid, limits, log_stretch


def trained(field, std=0.02, seed=1):
    weights = field.initial().double()
    down = field.split(weights)[1]
    generator = torch.Generator().manual_seed(seed)
    down.copy_(torch.randn(down.shape, generator=generator, dtype=torch.float64) * std)
    return weights


def frequencies(field, solved):
    constants, _ = field.constants()
    return torch.exp(constants - solved.detach()).numpy()


@pytest.mark.parametrize("dim", [4, 16, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_weights_of_zero_are_ntk_by_2t_minus_1(dim, base):
    field = Field(dim, base)
    scales = [*map(float, range(1, 65)), 64.5]
    found = frequencies(field, log_stretch(field, field.initial().double(), scales))
    for t, row in zip(scales, found, strict=True):
        ntk = make_scaling("ntk", dim=dim, base=base, factor=2 * t - 1, original_length=4096)
        np.testing.assert_allclose(row, ntk.inv_freq, rtol=1e-12)


def published(field, weights, scales):
    """ln theta at ``scales`` by scipy, on the whole equation as the paper's code has it."""
    up, down = (m.numpy() for m in field.split(weights))
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
    field = Field(64, base, width, act, step=0.02)
    weights, scales = trained(field), [1.0, 2.0, 3.0, 5.5, 8.0]
    expected = published(field, weights, scales)
    constants, _ = field.constants()
    found = constants - log_stretch(field, weights, scales)
    assert np.abs(expected - expected[0]).max() > 1
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_weights_matter():
    field = Field(128, 10000.0)
    zero = log_stretch(field, field.initial().double(), [8.0])
    assert (log_stretch(field, trained(field), [8.0]) - zero).abs().max() > 0.1


def solution_and_gradient(step, scales=16):
    field = Field(128, 10000.0, step=step)
    weights = trained(field).requires_grad_()
    solved = log_stretch(field, weights, [float(t) for t in range(1, scales + 1)])
    upstream = torch.randn(solved.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad(solved, weights, upstream)
    return solved.detach(), gradient


def test_the_default_step_is_more_exact_than_the_published_path():
    """The published fixed step of 0.01 in float32 is 2e-5 off in ln theta at t = 16."""
    exact, exact_gradient = solution_and_gradient(0.02)
    found, gradient = solution_and_gradient(Field(128, 10000.0).step)
    assert (found - exact).abs().max() < 1e-5
    assert (gradient - exact_gradient).norm() < 1e-5 * exact_gradient.norm()
    assert (found - exact).abs().max() > 0, "the comparison compares nothing"


def test_gradient_is_the_solutions_own():
    field = Field(8, 10000.0)
    weights = trained(field, std=0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: log_stretch(field, w, [1.0, 2.0, 3.5]), weights)


def test_grid_has_every_scale_and_no_step_too_long():
    scales, step = [1.0, 2.0, 3.0, 4.0, 4.3, 9.0], 0.1
    points = grid(scales, step)
    assert set(scales) <= set(points)
    assert points == sorted(set(points))
    for low, high in zip(points, points[1:], strict=False):
        assert high - low <= min(1.0, step * (2 * low - 1)) + 1e-12


def test_one_scale_alone_is_that_of_the_table():
    field = Field(32, 10000.0)
    weights = trained(field)
    table = log_stretch(field, weights, [1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(log_stretch(field, weights, [4.0])[0], table[3], atol=1e-6, rtol=0)
    assert (log_stretch(field, weights, [1.0]) == 0).all()


def test_initial_weights_are_the_same_everywhere():
    torch.manual_seed(0)
    first = Field(64, 10000.0).initial()
    torch.manual_seed(7)
    assert torch.equal(first, Field(64, 500000.0).initial())
    up, down = Field(64, 10000.0).split(first)
    assert (down == 0).all()
    assert 0.9 < up.abs().max() * math.sqrt(32) <= 1


def test_limits_are_half_a_turn_a_token():
    low, high = limits(Field(16, 10000.0))
    fastest = np.exp(Field(16, 10000.0).constants()[0].numpy() - low.numpy())
    np.testing.assert_allclose(fastest, math.pi)
    assert 0 < np.float32(np.exp(-high)) < 1e-30
