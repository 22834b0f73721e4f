# SPDX-License-Identifier: Apache-2.0
"""Attention beyond the window in bfloat16 on a GPU, against the dense softmax in float64."""

import pytest
import torch
from support.dense_attention import (
    LOCAL,
    Q,
    dense,
    dual_chunk_distance,
    self_extend_distance,
    string_distance,
)

from megatron_cream.attention import dual_chunk_attention, self_extend_attention, string_attention
from megatron_cream.mcore import cpu
from megatron_cream.rope import make_scaling

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CHUNKS = {"chunk_size": Q, "local_size": LOCAL}
METHODS = {
    "dual chunk": (dual_chunk_attention, CHUNKS, dual_chunk_distance),
    "string": (string_attention, {"shift": 30, "local_size": 7}, string_distance),
    "self-extend": (self_extend_attention, {"group_size": 4, "window": 21}, self_extend_distance),
}


@pytest.mark.parametrize("turning", [64, 32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_equal_the_dense_softmax(method, interleaved, turning):
    function, sizes, distance = METHODS[method]
    scaling = make_scaling("yarn", dim=turning, base=1e4, factor=4.0, original_length=64)
    torch.manual_seed(0)
    lengths = (120, 81)
    shapes = ((2, 201, 6, 64), (2, 201, 3, 64), (2, 201, 3, 64))
    fast = [torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in fast]
    out = function(*fast, scaling, lengths=lengths, interleaved=interleaved, **sizes)
    wanted = dense(*exact, scaling, distance, lengths, interleaved)
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    found = [out, *torch.autograd.grad((out * weight.to(out)).sum(), fast)]
    reference = [wanted, *torch.autograd.grad((wanted * weight).sum(), exact)]
    for one, other in zip(found, reference, strict=True):
        assert (one.detach().cpu().double() - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize(("b", "s", "heads"), [(1, 1000, 2), (1, 4000, 4), (2, 1000, 4)])
def test_tiles_that_cudnn_takes_give_what_float64_gives(b, s, heads):
    """Chunks of 256 tokens, the last shorter: what the tiles of the other test are too short for.

    Of one sample those that are alike are one batch.
    """
    scaling = make_scaling("none", dim=64, base=1e4, factor=1.0, original_length=384)
    torch.manual_seed(0)
    shapes = ((b, s, 4, 64), (b, s, heads, 64), (b, s, heads, 64))
    fast = [torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes]
    exact = [x.detach().cpu().double().requires_grad_() for x in fast]
    weight = torch.randn(shapes[0], dtype=torch.float64)
    found = []
    for tensors in (fast, exact):
        out = dual_chunk_attention(*tensors, scaling, chunk_size=288, local_size=32)
        found.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), tensors)])
    for one, other in zip(*found, strict=True):
        assert (one.detach().cpu().double() - other).norm() < 2e-2 * other.norm()
