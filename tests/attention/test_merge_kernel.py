# SPDX-License-Identifier: Apache-2.0
"""Tiles merged and attention by our kernels, in Triton's interpreter; as a program it is one run.

TRITON_INTERPRET=1 python test_merge_kernel.py [cuda]
"""

import os
import subprocess
import sys

import pytest
import torch


def test_merged_tiles_equal_float64(quick_python):
    pytest.importorskip("triton")
    done = subprocess.run(
        [quick_python, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == 8


def check(shape, tiles, dtype, device):
    from megatron_cream.attention.merge_kernel import merge

    b, h, n, d = shape
    outs = [torch.randn(n, b, h, d, device=device).to(dtype).permute(1, 2, 0, 3) for _ in tiles]
    outs[-1] = outs[-1].contiguous()
    sums = [torch.randn(b, h, n, device=device) * 20 for _ in tiles]
    whole = torch.full((b, h, n + 7, d), torch.nan, dtype=dtype, device=device)
    lse = torch.full((b, h, n + 7), torch.nan, device=device)
    merge(outs, sums, whole[:, :, 3 : 3 + n], lse[:, :, 3 : 3 + n])
    exact = torch.stack(sums).double()
    shares = exact.softmax(0).unsqueeze(-1)
    wanted = (torch.stack(outs).double() * shares).sum(0)
    found = whole[:, :, 3 : 3 + n].double()
    allowed = 1e-6 if dtype == torch.float32 else 8e-3  # the interpreter does not round to bf16
    assert (found - wanted).norm() < allowed * wanted.norm()
    torch.testing.assert_close(
        lse[:, :, 3 : 3 + n].double(), exact.logsumexp(0), atol=1e-4, rtol=1e-5
    )
    assert whole[:, :, :3].isnan().all() and whole[:, :, 3 + n :].isnan().all()


def check_attention(function, sizes, dim):
    """Ours by the kernels is what it is without them, output and gradients."""
    from megatron_cream.attention import banded, turning
    from megatron_cream.rope import make_scaling

    scaling = make_scaling("yarn", dim=dim, base=100.0, factor=4.0, original_length=16)
    tensors = [torch.randn(1, 23, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    found = []
    for kernels in (False, True):
        banded.takes_triton = turning.takes_triton = lambda _, kernels=kernels: kernels
        out = function(*tensors, scaling, lengths=(20, 3), interleaved=dim < 16, **sizes)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    print(f"{function.__name__}: right")


if __name__ == "__main__":
    from megatron_cream.attention import dual_chunk_attention, self_extend_attention

    torch.manual_seed(0)
    if len(sys.argv) == 1:
        check_attention(dual_chunk_attention, {"chunk_size": 5, "local_size": 1}, 16)
        check_attention(self_extend_attention, {"group_size": 3, "window": 12}, 12)
    for shape in ((2, 3, 45, 16), (1, 2, 64, 24), (1, 1, 1, 8)):
        for dtype, tiles in ((torch.float32, range(3)), (torch.bfloat16, range(2))):
            check(shape, tiles, dtype, sys.argv[1] if len(sys.argv) > 1 else "cpu")
            print(f"{shape}, {dtype}: right")
