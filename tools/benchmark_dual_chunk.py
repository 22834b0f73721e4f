# SPDX-License-Identifier: Apache-2.0
"""Time dual chunk attention beside plain causal attention on one GPU, in one run.

    python tools/benchmark_dual_chunk.py --lengths 32K 64K 128K

Medians of CUDA events over turns in which all sides alternate. *plain* is cuDNN's causal attention
on queries and keys that are rotated already; *ours* rotates inside. *reference* is the published
way: three kernels per chunk whose outputs are merged by detached weights, forward only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cream.attention import dual_chunk_attention
from megatron_cream.attention.bands import dual_chunk
from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.options import parse_length
from megatron_cream.rope import make_scaling

_aten = torch.ops.aten


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", nargs="+", type=parse_length, default=[32768, 65536, 131072])
    add("--window", type=parse_length, default=4096, help="trained window (default: 4K)")
    add("--heads", type=int, default=32, help="query heads (default: 32)")
    add("--key-heads", type=int, default=32, help="key and value heads (default: 32)")
    add("--head-dim", type=int, default=128, help="default: 128")
    add("--turns", type=int, default=7, help="timed turns of every side (default: 7)")
    return parser.parse_args(argv)


def milliseconds(function: Callable[[], object]) -> float:
    """Return the time of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by cuDNN, ``[b, s, h, d]``."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, chunk: int, local: int) -> Tensor:
    """The published prefill: per chunk three flash kernels, merged by a softmax of their sums."""
    bands, s = dual_chunk(chunk, local), q.shape[1]
    places = torch.arange(s, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k = _turn(k, bands.key_positions[0](places), inv_freq)
    queries = [_turn(q, positions(places), inv_freq) for positions in bands.query_positions]
    outputs = []
    for begin in range(0, s, chunk - local):
        group = tuple(bands.tiles(begin, min(begin + chunk - local, s)))
        answers = []
        for tile in group:
            rows, columns = slice(*tile.rows), slice(*tile.columns)
            answers.append(
                _aten._scaled_dot_product_flash_attention(
                    queries[tile.band][:, :, rows],
                    k[:, :, columns],
                    v[:, :, columns],
                    0.0,
                    tile.band == 0,
                    False,
                )[:2]
            )
        sums = torch.stack([lse[..., : group[0].rows[1] - group[0].rows[0]] for _, lse in answers])
        weights = sums.softmax(0).unsqueeze(-1).to(q.dtype)
        outputs.append(sum(out * w for (out, _), w in zip(answers, weights, strict=True)))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _turn(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(positions.float(), inv_freq).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def measure(args: argparse.Namespace, length: int) -> list[str]:
    """Return the row of one length."""
    shape = [1, length, args.heads, args.head_dim]
    small = [1, length, args.key_heads, args.head_dim]
    q, k, v = (
        torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for x in (shape, small, small)
    )
    scaling = make_scaling(
        "none", dim=args.head_dim, base=10000.0, factor=1.0, original_length=args.window
    )
    inv_freq = torch.as_tensor(scaling.inv_freq, dtype=torch.float32, device="cuda")
    chunk, local = 3 * args.window // 4, args.window // 8
    grad = torch.randn_like(q)

    def ours() -> Tensor:
        return dual_chunk_attention(q, k, v, scaling, chunk_size=chunk, local_size=local)

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (q, k, v), grad)

    def published() -> Tensor:
        keys, values = (x.repeat_interleave(args.heads // args.key_heads, 2) for x in (k, v))
        with torch.no_grad():
            return reference(q, keys, values, inv_freq, chunk, local)

    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: _without_grad(lambda: plain(q, k, v)),
        "ours": lambda: _without_grad(ours),
        "reference": published,
        "plain, both ways": both(lambda: plain(q, k, v)),
        "ours, both ways": both(ours),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for turn in range(args.turns + 1):
        for name, function in sides.items():
            torch.cuda.reset_peak_memory_stats()
            taken = milliseconds(function)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn:
                times[name].append(taken)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [
        str(length),
        *(f"{middle[name]:.2f}" for name in sides),
        f"{middle['ours'] / middle['plain']:.3f}",
        f"{middle['ours, both ways'] / middle['plain, both ways']:.3f}",
        f"{middle['reference'] / middle['ours']:.2f}",
        f"{peaks['ours, both ways'] / peaks['plain, both ways']:.2f}",
    ]


def _without_grad(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def check(args: argparse.Namespace) -> float:
    """Return the relative error of ours in bf16 on the GPU against float64 on the CPU."""
    length, window = 700, 256
    scaling = make_scaling(
        "none", dim=args.head_dim, base=10000.0, factor=1.0, original_length=window
    )
    shapes = ((1, length, 4, args.head_dim), *((1, length, 2, args.head_dim),) * 2)
    exact = [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]
    fast = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.detach().cpu().double().requires_grad_() for x in fast]
    sizes = {"chunk_size": 3 * window // 4, "local_size": window // 8}
    errors = []
    for tensors in (exact, fast):
        out = dual_chunk_attention(*tensors, scaling, **sizes)
        grads = torch.autograd.grad(out.float().square().sum(), tensors)
        errors.append([x.detach().double().cpu() for x in (out, *grads)])
    return max(
        float((found - wanted).norm() / wanted.norm())
        for wanted, found in zip(*errors, strict=True)
    )


def main(argv: list[str]) -> int:
    """Print the table."""
    args = parse_args(argv)
    with one_line_errors():
        if not torch.cuda.is_available():
            raise UserError("there is no GPU: this benchmark needs one")
        error = check(args)
        if not error < 2e-2 or math.isnan(error):
            raise UserError(f"dual chunk attention is off by {error:.3g} on this GPU, needs 2e-2")
        print(f"{torch.cuda.get_device_name()}, bf16, {args.heads} and {args.key_heads} heads of ")
        print(f"{args.head_dim}, window {args.window}; largest relative error {error:.2g}\n")
        print("| length | plain ms | ours | reference | plain both ways | ours both ways |", end="")
        print(" ours/plain | both ways | reference/ours | peak memory |")
        print("|" + "---|" * 10)
        for length in args.lengths:
            print("|", " | ".join(measure(args, length)), "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
