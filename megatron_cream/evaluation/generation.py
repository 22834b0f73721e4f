# SPDX-License-Identifier: Apache-2.0
"""Decodes greedily, one case at a time: by transformers' ``generate``, or by whole passes.

``generated_hit`` scores the published way, for comparison with ``scoring``: LongChat's, Lost in the
Middle's and the passkey scripts do this. ``cached_generation`` takes several cases at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_cream.evaluation.forward import ForwardPass, ScoringModel
from megatron_cream.evaluation.haystacks import HaystackCases

# Most new tokens in the published scripts.
NEW_TOKENS = {"longchat-lines": 35, "kv-retrieval": 50, "passkey": 20}


@torch.inference_mode()
def generate_tokens(
    module: Any, prompt: np.ndarray, new_tokens: int, eos: int | list[int] | None = None
) -> np.ndarray:
    """Return what greedy decoding writes after a prompt ``[n]``: at most ``new_tokens`` tokens.

    Args:
        module: a model of transformers.
        eos: tokens that end generation early.
    """
    tokens = torch.from_numpy(prompt)[None].to(module.device)
    made = module.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].cpu().numpy()


def generated_hit(
    module: Any, haystack: HaystackCases, index: int, new_tokens: int, eos: int | None = None
) -> bool:
    """Return whether greedy decoding writes the gold answer of one case of a haystack.

    As many tokens as the answer has are read at least.
    """
    tail = haystack.tails[index]
    whole = np.concatenate([haystack.context, tail.tokens])
    size = len(tail.answer)
    written = generate_tokens(module, whole[: len(whole) - size], max(new_tokens, size), eos)
    return np.array_equal(written[:size], tail.answer)


def generate_by_passes(
    model: ScoringModel, prompts: Sequence[np.ndarray], new_tokens: int, stop: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yield what greedy decoding writes after each prompt ``[n]``: a pass over all for each token.

    That is slow, and exact at any layout of a model. See ``forward.ScoringModel.generate``.
    """
    for prompt in prompts:
        tokens = prompt.astype(np.int64)
        while len(tokens) < len(prompt) + new_tokens:
            last = torch.tensor([len(tokens) - 1])
            one = ForwardPass(torch.from_numpy(tokens)[None], last, torch.zeros(1, 1).long())
            (scores,) = model.run(iter([one]))
            best = int(scores.best)
            if best in stop:
                break
            tokens = np.append(tokens, best)
        yield tokens[len(prompt) :]
