# SPDX-License-Identifier: Apache-2.0
"""Attention over bands equals the dense softmax over the papers' own case distinctions."""

import math

import pytest
import torch
from support.dense_attention import (
    LOCAL,
    Q,
    S,
    dense,
    dual_chunk_distance,
    self_extend_distance,
    string_distance,
)

from megatron_cream.attention import (
    dual_chunk_attention,
    sdpa,
    self_extend_attention,
    string_attention,
)
from megatron_cream.attention.sdpa import require_type
from megatron_cream.attention.turning import Rotation
from megatron_cream.errors import UserError
from megatron_cream.rope import make_scaling

LENGTHS = (1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 137, 201)

METHODS = {
    "dual chunk": (
        dual_chunk_attention,
        {"chunk_size": Q, "local_size": LOCAL},
        dual_chunk_distance,
    ),
    "string": (string_attention, {"shift": 30, "local_size": 7}, string_distance),
    "self-extend": (self_extend_attention, {"group_size": 4, "window": 21}, self_extend_distance),
}


def inputs(s, b=1, h=2, g=2, d=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, s, h, d), (b, s, g, d), (b, s, g, d))
    return [torch.randn(x, generator=generator, dtype=dtype, requires_grad=True) for x in shapes]


def gradients(out, tensors, seed=1):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), tensors)


def compare(method, s, lengths=None, scaling=None, interleaved=False, **shape):
    function, sizes, distance = METHODS[method]
    scaling = scaling or make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    tensors = inputs(s, **shape)
    expected = dense(*tensors, scaling, distance, lengths or (s,), interleaved)
    exact = function(*tensors, scaling, lengths=lengths, interleaved=interleaved, **sizes)
    assert (exact - expected).abs().max() < 1e-12
    wanted = gradients(expected, tensors)
    for found, gradient in zip(gradients(exact, tensors), wanted, strict=True):
        assert (found - gradient).abs().max() < 1e-11
    single = [x.detach().float().requires_grad_() for x in tensors]
    out = function(*single, scaling, lengths=lengths, interleaved=interleaved, **sizes)
    assert (out - expected).abs().max() < 2e-6
    for found, gradient in zip(gradients(out.double(), single), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-5 * max(1.0, gradient.norm())


@pytest.mark.parametrize("s", LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_dense_softmax(method, s):
    compare(method, s)


@pytest.mark.parametrize("method", METHODS)
def test_grouped_queries_batches_packed_documents_and_partial_interleaved_rotation(method):
    scaling = make_scaling("yarn", dim=8, base=100.0, factor=4.0, original_length=64)
    compare(
        method, 160, lengths=(S + 3, 1, 90, 26), scaling=scaling, interleaved=True, b=2, h=6, g=3
    )


def test_up_to_the_stride_it_is_ordinary_attention_bit_by_bit():
    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    q, k, v = inputs(S, dtype=torch.float32)
    ours = dual_chunk_attention(q, k, v, scaling, chunk_size=Q, local_size=LOCAL)
    angles = torch.arange(S)[:, None] * torch.from_numpy(scaling.inv_freq).float()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (turn(q), turn(k), v)), is_causal=True
    )
    assert torch.equal(ours, plain.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_factor_on_logits_follows_the_length_of_each_document(dtype):
    """Against the dense softmax of each document, its queries multiplied by the factor squared."""
    original, lengths = 48, (2 * S + 7, 48, 130, 5)
    scaling = make_scaling("yarn", dim=16, base=100.0, factor=4.0, original_length=64)
    tensors = inputs(sum(lengths), h=4, g=2)
    factors = [max(1.0, 0.1 * math.log(n / original) + 1.0) for n in lengths]
    assert factors[1] == factors[3] == 1.0 < factors[0] < factors[2] < 1.11
    rows = torch.tensor(factors, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    q, k, v = tensors
    scaled = rows[:, None, None]
    expected = dense(q * scaled, k * scaled, v, scaling, dual_chunk_distance, lengths)
    wanted = gradients(expected, tensors)
    given = [x.detach().to(dtype).requires_grad_() for x in tensors]
    found = dual_chunk_attention(
        *given, scaling, chunk_size=Q, local_size=LOCAL,
        original_max_position_embeddings=original, lengths=lengths,
    )  # fmt: skip
    exact = dtype == torch.float64
    assert (found - expected).abs().max() < (1e-12 if exact else 3e-6)
    for one, gradient in zip(gradients(found.double(), given), wanted, strict=True):
        assert (one - gradient).norm() <= (1e-12 if exact else 1e-5) * gradient.norm()


@pytest.mark.parametrize(("s", "n"), [(9 * S, 1), (16 * S + 5, 1), (19 * S - 1, 1), (9 * S, 2)])
def test_many_chunks(s, n):
    compare("dual chunk", s, b=n, h=1, g=1)


@pytest.mark.parametrize("chunks", [8, 16, 64])
def test_a_forward_pass_has_six_calls_of_kernels_per_eight_chunks(chunks, monkeypatch):
    kernel, rows = sdpa.forward, []

    def counted(q, *given):
        rows.append(len(q) * q.shape[2])
        return kernel(q, *given)

    monkeypatch.setattr(sdpa, "forward", counted)
    scaling = make_scaling("none", dim=4, base=100.0, factor=1.0, original_length=8)
    tensors = inputs(4 * chunks, h=1, g=1, d=4)
    dual_chunk_attention(*tensors, scaling, chunk_size=5, local_size=1)
    assert len(rows) <= 6 * chunks / 8 + 2  # in the first, tiles lack keys before the text
    assert sum(rows) <= 4 * chunks * (2 + 1 + math.log2(8) / 2)  # parts that are merged


def test_layers_share_one_rotation():
    like = torch.empty(1, dtype=torch.bfloat16)
    short, long = (
        make_scaling("yarn", dim=8, base=100.0, factor=4.0, original_length=64, beta_fast=fast)
        for fast in (32.0, 1.5)
    )
    one = Rotation.of(short, like)
    assert one is Rotation.of(make_scaling(**short.settings(), dim=8), like)
    assert one.inv_freq.dtype == torch.float32 and one.factor > 1
    assert Rotation.of(short, like, factor_in_scale=True).factor == 1
    assert (Rotation.of(long, like).inv_freq != one.inv_freq).any()
    assert Rotation.of(short, like.double()).inv_freq.dtype == torch.float64


def test_gpus_need_16_bit():
    for dtype in (torch.float32, torch.float64):
        require_type(dtype, on_gpu=False)
        with pytest.raises(UserError, match="kernels need --dtype bfloat16") as said:
            require_type(dtype, on_gpu=True)
        assert "\n" not in str(said.value)
    require_type(torch.bfloat16, on_gpu=True)


def test_gradcheck():
    scaling = make_scaling("none", dim=4, base=10.0, factor=1.0, original_length=8)
    tensors = inputs(17, h=1, g=1, d=4)

    def function(*x):
        return dual_chunk_attention(*x, scaling, chunk_size=6, local_size=2)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"chunk_size": 8, "local_size": 8}, "less than chunk_size"),
        ({"chunk_size": 8, "local_size": 5}, "at most half"),
        ({"chunk_size": 8, "local_size": -1}, "at least 0"),
        ({"chunk_size": 8, "local_size": 2, "lengths": (4, 5)}, "sum to 9"),
        ({"chunk_size": 8, "local_size": 2, "original_max_position_embeddings": -1}, "is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    scaling = make_scaling("none", dim=16, base=100.0, factor=1.0, original_length=64)
    with pytest.raises(UserError, match=said):
        dual_chunk_attention(*inputs(8), scaling, **sizes)
