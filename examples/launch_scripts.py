# SPDX-License-Identifier: Apache-2.0
"""Writes every launch script of this folder from the plan of its run: ``make launch-scripts``.

One more is a row of ``SCRIPTS``. One of your own needs no row:

    megatron-cream plan llama-2-7b --gpus 8 --target-length 65536 --script examples/mine/64k.sh
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# ruff: noqa: E402
from megatron_cream.cli import make_parser
from megatron_cream.errors import one_line_errors
from megatron_cream.planning.plan import compare, launch_script

LLAMA_2_7B = {
    "notes": [
        "RETRIEVAL_SHARE=0 ROPE=linear is CREAM's published recipe: 1000 steps of 32 samples, 2e-5",
        "after 10 steps.",
    ]
}
CHAT = {
    "name": "llama-2-7b-chat",
    "hf": "meta-llama/Llama-2-7b-chat-hf",
    "notes": [
        "CREAM's published recipe for a chat model: 100 steps of 32 conversations of 4096 tokens",
        "or more, 2e-5 without warm-up. Conversations become text by megatron-cream render-chat;",
        "every token is trained, the user's too.",
    ],
    "variables": {"WARMUP": "0", "RETRIEVAL_SHARE": "0"},
    "data": "data/conversations",
}
CHUNKLLAMA = {
    **CHAT,
    "notes": [
        "ChunkLlama's published fine-tuning (arXiv:2402.17463): conversations through dual chunk",
        "attention, 1600 steps of 16, 2e-5, cosine after 3 % of warm-up, no interpolation. Loss is",
        "on the assistant's words: render-chat --assistant-only, preprocess --mask-key trained.",
        "Time below 32K tokens is extrapolated, and memory is that of plain attention.",
    ],
    "variables": {"ROPE": "none", "WARMUP": "48", "RETRIEVAL_SHARE": "0"},
    "data": "data/answers",
    "more": {
        "EXTENSION_ARGS": "--dual-chunk --sample-unit packed-documents",
        "TRAINING_ARGS": "--lr-decay-style cosine",
    },
}
# A name of its own, or it would go on in the run of 128k.sh.
LARGE_BATCH = {
    "name": "llama-2-70b-batch-128",
    "variables": {"BASE": "checkpoints/llama-2-70b"},
    "notes": [
        "A larger batch for more GPUs: nobody has published CREAM with 128 samples per step, and",
        "it has not been tried here. The recipe is 32 samples, 1000 steps: 128k.sh.",
    ],
}
# Layouts of 70B models and of 13B are those that NVIDIA published and the planner agrees with.
SEVENTY = (
    "--gpus 32 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 "
    "--num-virtual-stages-per-pipeline-rank 5 --tp-comm-overlap"
)

# Megatron-Core's reference mapping, on half as many GPUs for a batch of 32.
MIXTRAL = (
    "--gpus 32 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 "
    "--expert-model-parallel-size 8"
)

# Where below this folder: how it is planned, and what the script says beside the plan.
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b/32k.sh": ("llama-2-7b --gpus 8 --target-length 32768", LLAMA_2_7B),
    "llama-2-7b/256k.sh": ("llama-2-7b --gpus 8 --target-length 262144", {}),
    "llama-2-7b/chat-32k.sh": (
        "llama-2-7b --gpus 8 --target-length 32768 --train-iters 100",
        CHAT,
    ),
    "llama-2-7b/chunkllama-16k.sh": (
        "llama-2-7b --gpus 8 --target-length 16384 --seq-length 16384 --global-batch-size 16 "
        "--train-iters 1600 --dual-chunk",
        CHUNKLLAMA,
    ),
    "llama-2-13b/32k.sh": (
        "llama-2-13b --gpus 8 --target-length 32768 --tensor-model-parallel-size 1",
        {},
    ),
    "llama-2-70b/32k.sh": (f"llama-2-70b --target-length 32768 {SEVENTY}", {}),
    "llama-2-70b/128k.sh": (f"llama-2-70b --target-length 131072 {SEVENTY}", {}),
    "llama-2-70b/128k-batch-128.sh": (
        f"llama-2-70b --target-length 131072 {SEVENTY.replace('--gpus 32', '--gpus 128')} "
        "--global-batch-size 128 --train-iters 300",
        LARGE_BATCH,
    ),
    "llama-3-70b/128k.sh": (
        f"llama-3-70b --target-length 131072 {SEVENTY} --grad-reduce-in-bf16",
        {},
    ),
    "llama-3.1-8b/256k.sh": (
        "llama-3.1-8b --gpus 8 --target-length 262144 --grad-reduce-in-bf16",
        {},
    ),
    "llama-3.1-70b/256k.sh": (
        f"llama-3.1-70b --target-length 262144 {SEVENTY} --grad-reduce-in-bf16",
        {},
    ),
    "mistral-7b/128k.sh": ("mistral-7b --gpus 8 --target-length 131072", {}),
    "mixtral-8x7b/64k.sh": (f"mixtral-8x7b --target-length 65536 {MIXTRAL}", {}),
    "mixtral-8x7b/128k.sh": (f"mixtral-8x7b --target-length 131072 {MIXTRAL}", {}),
    "qwen2.5-7b/128k.sh": ("qwen2.5-7b --gpus 8 --target-length 131072", {}),
    "qwen2.5-7b/256k.sh": ("qwen2.5-7b --gpus 8 --target-length 262144", {}),
    "qwen2.5-32b/128k.sh": (
        "qwen2.5-32b --gpus 8 --target-length 131072 --use-precision-aware-optimizer",
        {},
    ),
}


def texts() -> dict[Path, str]:
    """Plan every run; return the content of each script."""
    parser = make_parser("plan")
    found = {}
    for place, (command, beside) in SCRIPTS.items():
        path = HERE / place
        path.parent.mkdir(exist_ok=True)
        args = parser.parse_args([*shlex.split(command), "--script", str(path)])
        found[path] = launch_script(compare(args), args, **beside)
    return found


def main() -> None:
    """Write every script."""
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)


if __name__ == "__main__":
    with one_line_errors():
        main()
