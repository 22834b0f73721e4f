# SPDX-License-Identifier: Apache-2.0
"""Logits by CTranslate2 of folders that its own converter read: OUT IDS.npz FOLDER..."""

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from runner import Refused, main


def logits(folder: str, work: str, sequences: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        TransformersConverter(folder).convert(f"{work}.ct2", force=True)
    except (NotImplementedError, ValueError) as error:  # how the converter refuses a RoPE
        raise Refused(str(error)) from None
    model = ctranslate2.Generator(f"{work}.ct2", device="cpu", compute_type="float32")
    return {
        name: np.array(model.forward_batch([tokens.tolist()], return_log_probs=False))[0]
        for name, tokens in sequences.items()
    }


if __name__ == "__main__":
    main(logits, ctranslate2.__version__)
