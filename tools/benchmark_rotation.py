# SPDX-License-Identifier: Apache-2.0
"""Time the rotation of queries and keys beside Transformer Engine's and a copy, on one GPU.

    python tools/benchmark_rotation.py

Queries and keys are strided views of one tensor, as Megatron's projection gives them. Medians over
turns in which all sides alternate, over several sets of inputs that together exceed the cache.
*copy* moves the same bytes, device to device; *mixed* rotates inside the projection's tensor and
writes its gradient in one piece, where *ours* leaves that to autograd.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cream.errors import UserError, one_line_errors

SHAPES = {  # tokens, samples, query heads, key heads, head dimension
    "4096 x 4, 32 + 32 heads": (4096, 4, 32, 32, 128),
    "4096 x 4, 32 + 8 heads": (4096, 4, 32, 8, 128),
    "4096 x 1, 32 + 32 heads": (4096, 1, 32, 32, 128),
    "8192 x 8, 9 + 3 heads": (8192, 8, 9, 3, 64),
}
SETS = 3


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=30, help="timed turns of a side (default: 30)")
    args = parser.parse_args(argv)
    with one_line_errors():
        if not torch.cuda.is_available():
            raise UserError("there is no GPU: this benchmark needs one")
        print(f"{torch.cuda.get_device_name()}, bf16, medians of {args.turns} turns, ms\n")
        print("| shape | pass | copy | ours | mixed | Transformer Engine | ours / copy's speed |")
        print("|---|---|---|---|---|---|---|")
        for name, shape in SHAPES.items():
            for row in measure(shape, args.turns):
                print(f"| {name} | {' | '.join(row)} |", flush=True)
    return 0


def measure(shape: tuple[int, ...], turns: int) -> list[list[str]]:
    """Return a row for the forward pass and one for both passes."""
    sets = [_Inputs(*shape) for _ in range(SETS)]
    rows = []
    for label, both in (("forward", False), ("both", True)):
        sides = _sides(sets, both)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns + 3):
            for name, side in sides.items():
                taken = _milliseconds(side, turn % SETS)
                if turn >= 3:
                    times[name].append(taken)
        middle = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{middle[n]:.4f}" if n in middle else "" for n in ("copy", "ours", "mixed", "te")]
        rows.append([label, *cells, f"{middle['copy'] / middle['ours']:.3f}"])
    return rows


class _Inputs:
    def __init__(self, s: int, b: int, h: int, g: int, d: int) -> None:
        from megatron_cream.rope.rotation_kernel import table

        self.n, self.d = h // g, d
        self.mixed = torch.randn(
            s, b, g, (self.n + 2) * d, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        self.angles = torch.rand(s, b, 1, d // 2, device="cuda").repeat(1, 1, 1, 2) * 6
        self.table = table(self.angles)
        self.grads = [
            torch.randn(s, b, heads, d, device="cuda", dtype=torch.bfloat16) for heads in (h, g)
        ]
        self.source = torch.randn(s, b, h + g, d, device="cuda").bfloat16()
        self.target = torch.empty_like(self.source)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Queries ``[s, b, h, d]`` and keys ``[s, b, g, d]`` as views that have gradients."""
        by_head = self.mixed.unflatten(-1, (self.n + 2, self.d))
        return by_head[..., : self.n, :].flatten(2, 3), by_head[..., self.n, :]


def _sides(sets: list[_Inputs], both: bool) -> dict[str, Callable[[int], object]]:
    from megatron_cream.rope.rotation_kernel import rotate, rotate_mixed

    leaves = [[x.detach().requires_grad_() for x in i.parts()] for i in sets]

    def copy(index: int) -> None:
        for _ in range(2 if both else 1):
            sets[index].target.copy_(sets[index].source)

    def finish(outputs: tuple[Tensor, ...], index: int, inputs: object) -> None:
        if both:
            torch.autograd.grad(outputs[:2], inputs, sets[index].grads)

    def ours(index: int) -> None:
        finish(rotate(*leaves[index], sets[index].table), index, leaves[index])

    def mixed(index: int) -> None:
        i = sets[index]
        outputs = rotate_mixed(i.mixed, i.table, i.n)
        if both:
            torch.autograd.grad(outputs, i.mixed, [*i.grads, i.grads[1]])

    sides: dict[str, Callable[[int], object]] = {"copy": copy, "ours": ours, "mixed": mixed}
    te = _transformer_engine()
    if te is not None:

        def theirs(index: int) -> None:
            i = sets[index]
            angles = i.angles.reshape(-1, 1, 1, i.d)
            outputs = tuple(te(x.flatten(0, 1).unsqueeze(1), angles) for x in leaves[index])
            if both:
                grads = [x.flatten(0, 1).unsqueeze(1) for x in i.grads]
                torch.autograd.grad(outputs, leaves[index], grads)

        sides["te"] = theirs
    return sides


def _transformer_engine() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    except ImportError:
        return None
    return lambda x, angles: apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)


def _milliseconds(side: Callable[[int], object], index: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU waits while the host queues all of a side: a launch takes longer than some kernels.
    torch.cuda._sleep(3_000_000)
    start.record()
    side(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
