# SPDX-License-Identifier: Apache-2.0
"""Writes the command that starts a planned run, one bash array per theme."""

from __future__ import annotations

from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import ParallelLayout, Workload
from megatron_cream.planning.models import BaseModel, megatron_flags
from megatron_cream.torchrun import ONE_NODE


def run_flags(
    shape: BaseModel, layout: ParallelLayout, work: Workload, target: int, iterations: int
) -> dict[str, list[str]]:
    """Return the flags of ``megatron_cream.pretrain`` by theme; paths are shell variables.

    Raises:
        UserError: a base model whose own RoPE cannot be named by flags alone.
    """
    size, kind, rotary = megatron_flags(shape)
    length = str(work.seq_length)
    return {
        "SIZE": size,
        "KIND": kind,
        "ROPE": rotary + rope_flags(shape, target),
        "LAYOUT": layout_flags(layout),
        "EXTENSION": [
            *("--seq-length", length, "--max-position-embeddings", length),
            *("--target-length", str(target), *_position_flags(work.seq_length, target)),
        ],
        "DATA": [
            *("--data-path", "$DATA", "--split", "99,1,0"),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(shape.vocabulary)),
            "--no-create-attention-mask-in-dataloader",
        ],
        # CREAM's recipe (arXiv:2406.07138): 1000 steps of 32 samples, 2e-5 after 10 steps.
        "BATCH": [
            *("--micro-batch-size", str(work.micro_batch)),
            *("--global-batch-size", str(work.global_batch), "--train-iters", str(iterations)),
        ],
        "OPTIMIZER": [
            *("--bf16", "--lr", "2e-5", "--min-lr", "0", "--lr-decay-style", "linear"),
            *("--lr-warmup-iters", str(min(10, iterations // 2)), "--weight-decay", "0"),
        ],
        "CHECKPOINTS": [
            *("--pretrained-checkpoint", "$BASE", "--save", "$OUT", "--load", "$OUT"),
            *("--save-interval", "100", "--eval-interval", "100", "--eval-iters", "4"),
        ],
    }


def layout_flags(layout: ParallelLayout) -> list[str]:
    """Return Megatron's flags for a layout; the data parallel size is what remains."""
    flags = ["--tensor-model-parallel-size", str(layout.tensor)]
    flags += ["--sequence-parallel"] if layout.tensor > 1 else []
    flags += ["--pipeline-model-parallel-size", str(layout.pipeline)]
    if layout.first_layers is not None:
        flags += ["--decoder-first-pipeline-num-layers", str(layout.first_layers)]
    if layout.last_layers is not None:
        flags += ["--decoder-last-pipeline-num-layers", str(layout.last_layers)]
    if layout.context > 1:
        flags += ["--context-parallel-size", str(layout.context)]
    flags += ["--use-distributed-optimizer"]
    if layout.data * layout.context > 1:
        flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    if layout.recompute:
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        flags += ["--recompute-num-layers", "1"]
    return flags


def rope_flags(shape: BaseModel, target: int) -> list[str]:
    """Return our flags for RoPE at ``target`` tokens, from the window the model has.

    Only what the trainer would not choose by itself: a longer window is interpolated by default.

    Raises:
        UserError: the model was released with an interpolation that has no flags of its own.
    """
    if shape.rope_type == "llama3":
        factor = shape.rope_factor * max(1.0, target / shape.trained_length)
        flags = ["--rope-interpolation", "llama3", "--rope-factor", f"{factor:g}"]
        return [*flags, "--original-length", str(shape.rope_original)]
    if shape.rope_type != "default":
        raise UserError(
            f"MODEL is {shape.name}: its config.json has rope_type {shape.rope_type!r}, it must be "
            "'default' or 'llama3'; for others give --rope-base-config to the training run itself"
        )
    if target <= shape.trained_length:
        return ["--rope-interpolation", "none", "--original-length", str(target)]
    return ["--original-length", str(shape.trained_length)]


def _position_flags(length: int, target: int) -> list[str]:
    if target <= length:
        return ["--position-strategy", "full"]
    return ["--position-strategy", "cream"]


def argv(flags: dict[str, list[str]]) -> list[str]:
    """Return the flags of all themes in one list, as the training process gets them."""
    return [flag for theme in flags.values() for flag in theme]


def script(flags: dict[str, list[str]], gpus: int, gpus_per_node: int) -> str:
    """Return bash that starts the run; the same on every node but for ``NODE``."""
    nodes = -(-gpus // gpus_per_node)
    if nodes > 1:
        launch = f'--nnodes {nodes} --node-rank "$NODE" --nproc-per-node {gpus_per_node} '
        launch += '--master-addr "$HEAD" --master-port 29500'
        where = f"# on each of {nodes} nodes: NODE counts them from 0, HEAD is the first one's name"
    else:
        launch = f"{' '.join(ONE_NODE)} --nproc-per-node {gpus}"
        where = "# on one node"
    arrays = [f"{name}=({' '.join(map(_quote, theme))})" for name, theme in flags.items()]
    names = [f'"${{{name}[@]}}"' for name in flags]
    half = len(names) // 2
    return "\n".join(
        [
            where,
            "# BASE: checkpoint to start from, DATA: indexed dataset, OUT: checkpoints of this run",
            "export CUDA_DEVICE_MAX_CONNECTIONS=1",
            f"LAUNCH=({launch})",
            *arrays,
            'torchrun "${LAUNCH[@]}" -m megatron_cream.pretrain \\',
            f"    {' '.join(names[:half])} \\",
            f"    {' '.join(names[half:])}",
        ]
    )


def _quote(flag: str) -> str:
    return f'"{flag}"' if flag.startswith("$") or "," in flag else flag
