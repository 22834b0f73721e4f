# SPDX-License-Identifier: Apache-2.0
"""The merge of tiles by Triton, in its interpreter, against float64; as a program it is one run.

TRITON_INTERPRET=1 python test_merge_kernel.py [cuda]
"""

import os
import subprocess
import sys

import pytest
import torch


def test_merged_tiles_equal_float64():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == 6


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
    assert (found - wanted).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * wanted.norm()
    torch.testing.assert_close(
        lse[:, :, 3 : 3 + n].double(), exact.logsumexp(0), atol=1e-4, rtol=1e-5
    )
    assert whole[:, :, :3].isnan().all() and whole[:, :, 3 + n :].isnan().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape in ((2, 3, 45, 16), (1, 2, 64, 24), (1, 1, 1, 8)):
        for dtype, tiles in ((torch.float32, range(3)), (torch.bfloat16, range(2))):
            check(shape, tiles, dtype, sys.argv[1] if len(sys.argv) > 1 else "cpu")
            print(f"{shape}, {dtype}: right")
