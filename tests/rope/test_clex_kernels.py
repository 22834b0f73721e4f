# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE by the GPU's kernels, which Triton interprets here, equals the one on the host."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.commands import load_file

from megatron_cream.extras.clex import divisors
from megatron_cream.extras.clex.ode import VectorField, limits, solve
from megatron_cream.rope.scaling import rounded_list

triton = pytest.importorskip("triton", reason="comes with torch on Linux")
from megatron_cream.extras.clex import ode_triton  # noqa: E402

SCRIPT = Path(__file__).with_name("clex_interpreted.py")
child = load_file(SCRIPT)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory, quick_python):
    path = tmp_path_factory.mktemp("interpreted") / "results.npz"
    # Triton reads it when it is imported, so not in this process.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [quick_python, str(SCRIPT), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(path)


@pytest.mark.parametrize("name", child.CASES)
def test_solution_and_gradient_are_the_hosts(name, interpreted):
    field, weights, scales, upstream = child.case(name)
    solved = solve(field, weights, scales)
    untrained = solve(field, field.initial().double().numpy(), scales).log_stretch
    assert np.abs(solved.log_stretch - untrained).max() > 1e-3, "the trained term does nothing"
    np.testing.assert_allclose(interpreted[name], solved.log_stretch, rtol=1e-12, atol=1e-12)
    expected = solved.pull_back(upstream)
    most = 1e-12 * np.abs(expected).max()
    np.testing.assert_allclose(interpreted[f"{name}, gradient"], expected, rtol=0, atol=most)


@pytest.mark.parametrize(("kernel", "carried"), [("_forward", 5), ("_reverse", 4)])
def test_compiler_keeps_what_a_loop_hands_on(kernel, carried):
    """It has taken a register for a constant, which the interpreter cannot show."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(ode_triton, kernel)
    fixed = {n: v for n, v in ode_triton.sizes(VectorField(128, 10000.0)).items() if n.isupper()}
    types = {name: "*fp64" for name in function.arg_names if name not in fixed}
    types |= {"stages": "i32", **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(fn=function, signature=types, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    (registers,) = re.findall(r"scf\.for .* iter_args\((.*?)\)", compiled.asm["ttir"])
    assert registers.count("=") == carried


@pytest.mark.parametrize("name", ["trained", "at the limits"])
def test_table_is_the_hosts(name, interpreted):
    """Frequencies bit for bit, and gradients of what leads back alone beyond a limit."""
    frequencies, finite, gradient = child.step(child.STANDARD_DEVIATIONS[name])
    found = interpreted[f"table, {name}, frequencies"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, frequencies)
    assert finite and interpreted[f"table, {name}, finite"]
    assert (found.max() > 3.1) == (name == "at the limits")
    most = 1e-9 * np.abs(gradient).max()
    np.testing.assert_allclose(interpreted[f"table, {name}, gradient"], gradient, atol=most)


def test_weights_that_are_no_numbers_are_told_apart(interpreted):
    """A step goes on with numbers, so that its end is reached, where it is refused."""
    assert not interpreted["table, no numbers, finite"]
    assert np.isfinite(interpreted["table, no numbers, frequencies"]).all()


def test_frequencies_are_rounded_as_a_servers():
    """float32 by torch and by numpy: their exp may differ in float64's last bit, once in 1e7."""
    field = VectorField(128, 10000.0)
    low, high = limits(field)
    powers = np.float32(10000.0) ** np.linspace(0, 1, 64, dtype=np.float32)
    stretch = np.random.default_rng(0).uniform(-4.0, 100.0, size=(20000, 64))
    with np.errstate(over="ignore"):  # a pair that does not turn
        expected = rounded_list(divisors(field, stretch), powers)
    tensors = (torch.from_numpy(array) for array in (stretch, powers, low))
    found = ode_triton.frequencies(*tensors, high).numpy()
    assert found.dtype == np.float32
    assert (found != expected).sum() <= 2
    assert (stretch < low).any() and (stretch > high).any()


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize(
    ("finite", "gradient", "checked", "message"),
    [
        (False, float("nan"), True, "frequencies that are not finite.*--lr"),
        (False, 1.0, False, "frequencies that are not finite.*--lr"),
        (True, float("inf"), True, "NaN or Inf in the gradient of CLEX's weights"),
        (True, float("inf"), False, None),
        (True, 1.0, True, None),
    ],
)
def test_end_of_a_step_refuses(monkeypatch, finite, gradient, checked, message):
    from megatron_cream.extras.clex import trained_rotary

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: None)
    forgotten = []
    table = SimpleNamespace(
        finite=lambda: torch.tensor(finite),
        gradient=lambda: torch.ones(2, 2),
        pull_back=lambda total: torch.full((3,), gradient),
        forget=lambda: forgotten.append(True),
    )
    weights = SimpleNamespace(main_grad=torch.zeros(3))
    chunk = SimpleNamespace(
        rotary_pos_emb=SimpleNamespace(table=table, weights=weights),
        ddp_config=SimpleNamespace(check_for_nan_in_grad=checked),
    )
    if message is None:
        trained_rotary.finish([chunk], 1.0)
        assert forgotten and (weights.main_grad == gradient).all()
        return
    with pytest.raises(RuntimeError, match=message):
        trained_rotary.finish([chunk], 1.0)
    assert (weights.main_grad == 0).all()
