# SPDX-License-Identifier: Apache-2.0
"""CLEX's GPU path on CPU tensors, by Triton's interpreter, which has a process of its own.

TRITON_INTERPRET=1 python clex_interpreted.py results.npz
"""

import sys

import numpy as np
import torch

# dim, width, act, largest step, scales
CASES = {
    "few pairs, many steps": (8, 1, "tanh", 0.1, [1.0, 2.0, 3.0, 4.0]),
    "a last scale that is not whole": (8, 2, "silu", 0.5, [1.0, 2.0, 3.0, 3.5]),
    "one scale, without t = 1": (16, 1, "silu", 0.5, [4.5]),
    "padded": (80, 1, "silu", 0.1, [1.0, 2.0, 2.5]),
    "padded, in blocks": (80, 2, "tanh", 0.5, [1.0, 2.0, 3.0]),
    "an odd number of pairs": (6, 3, "tanh", 0.5, [1.0, 2.0]),
    "a whole tile": (128, 1, "tanh", 0.5, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.3]),
    "a whole tile, silu": (128, 1, "silu", 0.5, [1.0, 2.0, 3.0, 4.0]),
    "in blocks": (128, 2, "silu", 0.5, [1.0, 2.0, 3.0, 4.0]),
    "more pairs": (256, 1, "tanh", 0.5, [1.0, 2.0]),
}


def case(name):
    """VectorField, weights, scales and a gradient of ``log_stretch``."""
    from megatron_cream.extras.clex.ode import VectorField

    dim, width, act, step, scales = CASES[name]
    field, rng = VectorField(dim, 10000.0, width, act, step), np.random.default_rng(1)
    weights = field.initial().double().numpy()
    down = field.split(weights)[1]
    down[:] = rng.normal(scale=0.02, size=down.shape)
    return field, weights, scales, rng.normal(size=(len(scales), dim // 2))


def table(std):
    """A table and its weights; W_down of standard deviation 50 brings pairs to their limits."""
    from megatron_cream.extras.clex import ScaleTable
    from megatron_cream.rope import make_scaling

    scaling = make_scaling("clex", dim=16, factor=7.5, original_length=96)
    powers = torch.tensor([10000.0 ** (i / 8) for i in range(8)])
    found = ScaleTable(scaling, powers)
    weights = found.field.initial()
    generator = torch.Generator().manual_seed(3)
    down = found.field.split(weights)[1]
    down.copy_(std * torch.randn(down.shape, generator=generator))
    return found, weights


def step(std, device="cpu"):
    """What a training step asks of a table: frequencies, whether finite, the weights' gradient."""
    found, weights = table(std)
    inv_freq = found.solve(weights.to(device))
    finite = found.finite()
    (inv_freq * torch.arange(1.0, 9.0, device=device)).sin().sum().backward()
    gradient = found.pull_back(found.gradient())
    return tuple(part.detach().cpu().numpy() for part in (inv_freq, finite, gradient))


STANDARD_DEVIATIONS = {"trained": 0.1, "at the limits": 50.0, "no numbers": float("nan")}


def main(path):
    from megatron_cream.extras.clex import ode_triton

    results = {}
    for name in CASES:
        field, weights, scales, upstream = case(name)
        solved = ode_triton.solve(field, torch.from_numpy(weights), scales)
        results[name] = solved.log_stretch.numpy()
        results[f"{name}, gradient"] = solved.pull_back(torch.from_numpy(upstream)).numpy()
    torch.Tensor.is_cuda = property(lambda tensor: True)  # the table takes the GPU's path
    for name, std in STANDARD_DEVIATIONS.items():
        for part, values in zip(("frequencies", "finite", "gradient"), step(std), strict=True):
            results[f"table, {name}, {part}"] = values
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
