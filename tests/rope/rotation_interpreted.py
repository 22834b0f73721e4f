# SPDX-License-Identifier: Apache-2.0
"""The rotation kernels on CPU tensors by Triton's interpreter, against float64 on fresh inputs.

TRITON_INTERPRET=1 python rotation_interpreted.py [cuda]
"""

import sys

import torch

from megatron_cream.rope import rotation_kernel as kernels

# s, b, tables' b, groups, queries per group, d, rotated dimensions, interleaved, turnings
CASES = {
    "one head": (3, 1, 1, 1, 1, 8, 8, False, 1),
    "grouped queries": (2, 2, 2, 3, 2, 16, 16, False, 1),
    "one table for all samples": (2, 2, 1, 2, 2, 16, 16, False, 1),
    "partial": (2, 2, 2, 2, 1, 20, 12, False, 1),
    "interleaved, partial": (3, 1, 1, 2, 3, 24, 16, True, 1),
    "turned three ways": (2, 2, 2, 2, 2, 16, 12, False, 3),
    "many heads": (2, 1, 1, 40, 1, 128, 128, False, 1),
}
# The interpreter takes a second per case, and a program differs by its type in rounding alone.
INTERPRETED_IN_BFLOAT16 = ("grouped queries", "interleaved, partial", "turned three ways")


def exact(x, angles, interleaved, factor):
    """Rotate ``x`` ``[s, b, h, d]`` in float64."""
    half = angles.shape[-1]
    turning, rest = x.double().tensor_split([2 * half], dim=-1)
    first, second = (
        (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    )
    cos, sin = angles.cos() * factor, angles.sin() * factor
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def close(found, wanted, dtype):
    found, wanted = found.detach(), wanted.detach()
    error = float((found.double() - wanted).norm() / wanted.norm())
    return error < (1e-6 if dtype == torch.float32 else 4e-3)


def poisoned(device, dtype):
    """Fill the allocator's free memory with NaN, so that an unwritten output shows."""
    size = 1 << (16 if device == "cuda" else 10)
    blocks = [torch.full((size,), torch.nan, device=device, dtype=dtype) for _ in range(64)]
    del blocks


def check(name, device, dtype):
    s, b, table_b, g, n, d, turning, interleaved, turns = CASES[name]
    factor, kind = 1.25, {"device": device, "dtype": torch.float64}
    angles = [torch.rand(s, table_b, 1, turning // 2, **kind) * 6 for _ in range(turns)]
    tables = torch.stack([kernels.table(torch.cat((a, a), dim=-1).float(), factor) for a in angles])
    mixed = torch.randn(s, b, g, (n + 2) * d, device=device, dtype=dtype, requires_grad=True)
    by_head = mixed.unflatten(-1, (n + 2, d))
    q, k, v = by_head[..., :n, :].flatten(2, 3), by_head[..., n, :], by_head[..., n + 1, :]
    wanted = [exact(q, a.float().double(), interleaved, factor) for a in angles]
    wanted.append(exact(k, angles[0].float().double(), interleaved, factor))
    weights = [torch.randn(x.shape, device=device, dtype=dtype) for x in wanted]
    loss = sum((x * w.double()).sum() for x, w in zip(wanted, weights, strict=True))
    (gradient,) = torch.autograd.grad(loss + (v.double() * 3).sum(), mixed, retain_graph=True)
    poisoned(device, dtype)
    found = kernels.rotate(q, k, tables, interleaved)
    assert all(close(x, y, dtype) for x, y in zip(found, wanted, strict=True)), name
    loss = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
    poisoned(device, dtype)
    (own,) = torch.autograd.grad(loss + (v * 3).sum(), mixed)
    assert close(own, gradient.double(), dtype), name
    heads_first = q.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)  # [b, h, s, d]
    for one in (q, heads_first):
        poisoned(device, dtype)
        found = kernels.turn(one, tables, interleaved)
        assert all(close(x, y, dtype) for x, y in zip(found, wanted, strict=False)), name
    check_back(q, tables, interleaved, wanted[:-1], weights, dtype)
    if turns == 1:
        check_mixed(mixed, tables[0], n, interleaved, wanted, v, weights, gradient, dtype)


def check_back(q, tables, interleaved, wanted, weights, dtype):
    """The sum of gradients of all turnings, the first of them twice."""
    grads, turned = [*weights[:-1], weights[0]], [*wanted, wanted[0]]
    exact_loss = sum((x * w.double()).sum() for x, w in zip(turned, grads, strict=True))
    (gradient,) = torch.autograd.grad(exact_loss, q, retain_graph=True)
    grads[-1] = grads[-1].transpose(0, 2).contiguous().transpose(0, 2)  # strides of its own
    target = torch.full_like(q, torch.nan)
    kernels.turn_back(grads, [*tables, tables[0]], target, interleaved)
    error = float((target.double() - gradient.double()).norm() / gradient.double().norm())
    assert error < (1e-6 if dtype == torch.float32 else 8e-3)  # both are rounded to dtype


def check_mixed(mixed, tables, n, interleaved, wanted, v, weights, gradient, dtype):
    query, key, value = kernels.rotate_mixed(mixed, tables, n, interleaved)
    assert close(query, wanted[0], dtype) and close(key, wanted[1], dtype)
    assert torch.equal(value, v)
    loss = (query * weights[0]).sum() + (key * weights[1]).sum() + (value * 3).sum()
    poisoned(mixed.device, dtype)
    (own,) = torch.autograd.grad(loss, mixed)
    assert close(own, gradient.double(), dtype)


def main(device):
    for dtype in (torch.float32, torch.bfloat16):
        few = device == "cpu" and dtype == torch.bfloat16
        for name in INTERPRETED_IN_BFLOAT16 if few else CASES:
            torch.manual_seed(0)
            check(name, device, dtype)
            print(f"{name}, {dtype}: right")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
