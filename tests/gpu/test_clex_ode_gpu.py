# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE on a GPU: the host's solution and gradient, and nothing that waits for the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import load_file

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU: it runs compiled Triton kernels", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton, which comes with torch on Linux")

from megatron_cream.extras.clex import ode_triton  # noqa: E402
from megatron_cream.extras.clex.ode import solve  # noqa: E402

_path = Path(__file__).parents[1] / "rope" / "clex_interpreted.py"
cases = load_file(_path)


def on_device(*arrays):
    return [torch.from_numpy(array).cuda() for array in arrays]


def check(field, weights, scales, upstream, dtype=torch.float64):
    """Compare with the host's, from weights rounded to ``dtype``."""
    there, upstream_there = on_device(weights, upstream)
    there = there.to(dtype)
    solved = ode_triton.solve(field, there, scales)
    gradient = solved.pull_back(upstream_there)
    assert solved.log_stretch.is_cuda and gradient.is_cuda
    expected = solve(field, there.double().cpu().numpy(), scales)
    found = solved.log_stretch.cpu().numpy()
    np.testing.assert_allclose(found, expected.log_stretch, rtol=1e-10, atol=1e-10)
    back = expected.pull_back(upstream)
    most = 1e-10 * np.abs(back).max()
    np.testing.assert_allclose(gradient.cpu().numpy(), back, rtol=0, atol=most)


@pytest.mark.parametrize("name", cases.CASES)
def test_solution_and_gradient_are_the_hosts(name):
    check(*cases.case(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_a_models_type(dtype):
    check(*cases.case("a whole tile"), dtype)


def test_many_scales():
    """T / N0 = 64: 256 stages, of which each needs the one before."""
    field, weights, _, _ = cases.case("a whole tile")
    upstream = np.random.default_rng(2).normal(size=(64, 64))
    check(field, weights, [float(t) for t in range(1, 65)], upstream)


def test_same_bits_again():
    """Replicas on other ranks must stay the same."""
    field, weights, scales, upstream = cases.case("a whole tile")
    there, upstream_there = on_device(weights, upstream)
    first, second = (
        (solved.log_stretch, solved.pull_back(upstream_there))
        for solved in (ode_triton.solve(field, there, scales) for _ in range(2))
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_table_is_the_hosts():
    for name in ("trained", "at the limits"):
        std = cases.STANDARD_DEVIATIONS[name]
        frequencies, _, gradient = cases.step(std)
        found, finite, back = cases.step(std, "cuda")
        # exp may differ in float64's last bit, which float32 shows once in 1e7.
        assert (found != frequencies).sum() <= 1
        np.testing.assert_allclose(found, frequencies, rtol=2e-7)
        # The sines before it are float32.
        np.testing.assert_allclose(back, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())
        assert finite
    frequencies, finite, _ = cases.step(float("nan"), "cuda")
    assert not finite and np.isfinite(frequencies).all()


def test_nothing_waits_for_the_device():
    """A step, but for what the first one of a process compiles and copies."""
    table, weights = cases.table(0.1)
    weights = weights.cuda()

    def step():
        inv_freq = table.solve(weights)
        inv_freq.grad = torch.ones_like(inv_freq)
        table.pull_back(table.gradient() / 2.0)
        table.forget()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            weights.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
