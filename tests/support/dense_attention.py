# SPDX-License-Identifier: Apache-2.0
"""Attention beyond the window as the papers define it: a distance per pair, one dense softmax."""

import math

import torch

Q, LOCAL = 48, 8
S = Q - LOCAL


def dual_chunk_distance(i, j):
    same, before = i // S == j // S, i // S - j // S == 1
    if same:
        return i - j
    return (min(i % S + S, Q) if before else Q) - j % S


def string_distance(i, j):
    return i - j if i - j < 30 else i - j - 30 + 7


def self_extend_distance(i, j):
    return i - j if i - j <= 21 else i // 4 - j // 4 + 21 - 21 // 4


def dense(q, k, v, scaling, distance, lengths, interleaved=False):
    """The definition: logits of every pair by its own distance, one softmax; float64."""
    b, s, h, d = q.shape
    groups = h // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    first, second = pairs(torch.arange(scaling.dim), interleaved)
    logits = torch.full((b, h, s, s), -math.inf, dtype=torch.float64)
    offset = 0
    for length in lengths:
        part = slice(offset, offset + length)
        # Every pair (i, j) at once: [b, i, j, h, d].
        queries, keys = q[:, part, None], k[:, None, part]
        gaps = [[distance(i, j) if j <= i else 0 for j in range(length)] for i in range(length)]
        angle = torch.tensor(gaps, dtype=torch.float64)[:, :, None, None] * torch.from_numpy(
            scaling.inv_freq
        )
        q1, q2, k1, k2 = (x[..., half] for x in (queries, keys) for half in (first, second))
        # Re(q conj(k) e^(i angle)), the rotation by the difference of two positions.
        turned = (q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()
        rest = (queries[..., scaling.dim :] * keys[..., scaling.dim :]).sum(-1)
        value = (turned.sum(-1) * scaling.attention_factor**2 + rest).permute(0, 3, 1, 2)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits[:, :, part, part] = value.masked_fill(later, -math.inf)
        offset += length
    weights = (logits / math.sqrt(d)).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def pairs(index, interleaved):
    return (index[::2], index[1::2]) if interleaved else index.chunk(2)
