# SPDX-License-Identifier: Apache-2.0
"""Logits by llama.cpp of folders that its own converter read: OUT IDS.npz FOLDER...

LLAMA_CPP is llama.cpp's source, with the converter; the runtime is llama-cpp-python's.
"""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from runner import Refused, main


def logits(folder: str, work: str, sequences: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gguf = convert(folder, f"{work}.gguf")
    most = max(map(len, sequences.values()))
    options = {"n_ctx": most, "n_batch": most, "n_ubatch": most, "n_threads": 1}
    options |= {"type_k": 0, "type_v": 0}  # keys and values in float32, not float16
    model = llama_cpp.Llama(gguf, logits_all=True, verbose=False, flash_attn=False, **options)
    found = {}
    for name, tokens in sequences.items():
        model.reset()
        model.eval(tokens.tolist())
        found[name] = np.array(model.scores[: len(tokens)])
    return found


def convert(folder: str, gguf: str) -> str:
    source = Path(os.environ["LLAMA_CPP"])
    path = os.pathsep.join([str(source / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(source / "convert_hf_to_gguf.py"), folder]
        + ["--outtype", "f32", "--outfile", gguf],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1])
    return gguf


if __name__ == "__main__":
    main(logits, llama_cpp.__version__)
