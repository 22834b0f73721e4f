# SPDX-License-Identifier: Apache-2.0
"""Logits of folders by the transformers on the path: OUT IDS.npz FOLDER...; see runner.py."""

import numpy as np
import torch
import transformers
from runner import Refused, main


def logits(folder: str, work: str, sequences: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except KeyError as error:
        raise Refused(f"KeyError: {error}") from None
    with torch.no_grad():
        return {
            name: model(torch.from_numpy(tokens)[None]).logits[0].numpy()
            for name, tokens in sequences.items()
        }


if __name__ == "__main__":
    main(logits, transformers.__version__)
