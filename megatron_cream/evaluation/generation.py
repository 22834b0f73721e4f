# SPDX-License-Identifier: Apache-2.0
"""Scores the published way: by generation with a key-value cache, one case at a time.

For comparison with ``scoring``: LongChat's, Lost in the Middle's and the passkey scripts do this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_cream.evaluation.haystacks import HaystackCases

# Most new tokens in the published scripts.
NEW_TOKENS = {"longchat-lines": 35, "kv-retrieval": 50, "passkey": 20}


@torch.inference_mode()
def generate_tokens(
    module: Any, prompt: np.ndarray, new_tokens: int, eos: int | None = None
) -> np.ndarray:
    """Return what greedy decoding writes after a prompt ``[n]``: at most ``new_tokens`` tokens.

    Args:
        module: a model of transformers.
        eos: token that ends generation early.
    """
    tokens = torch.from_numpy(prompt)[None].to(module.device)
    made = module.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
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
