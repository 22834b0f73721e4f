# SPDX-License-Identifier: Apache-2.0
"""The published way to score: generate with a key-value cache, one case at a time.

For comparison with ``scoring``: LongChat's, Lost in the Middle's and the passkey scripts do this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_cream.evaluation.haystacks import Haystack

# Most new tokens in the published scripts.
NEW_TOKENS = {"longchat-lines": 35, "kv-retrieval": 50, "passkey": 20}


@torch.inference_mode()
def generated_hit(
    module: Any, haystack: Haystack, index: int, new_tokens: int, eos: int | None = None
) -> bool:
    """Return whether greedy decoding writes the gold answer of one case of a haystack.

    Args:
        module: a model of transformers.
        new_tokens: how many tokens it may write; at least as many as the answer has are read.
        eos: token that ends generation early.
    """
    tail = haystack.tails[index]
    answer = tail.answer
    whole = np.concatenate([haystack.context, tail.tokens])
    prompt = torch.from_numpy(whole[: len(whole) - len(answer)])[None].to(module.device)
    made = module.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(new_tokens, len(answer)),
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    written = made[0, prompt.shape[1] :].cpu().numpy()
    return np.array_equal(written[: len(answer)], answer)
