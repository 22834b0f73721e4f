# SPDX-License-Identifier: Apache-2.0
"""Writes a planned run as flags, as bash to paste, and as a launch script of ``examples/``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
from megatron_cream.planning.models import GIB, SAVED, BaseModel, megatron_flags, peak_memory
from megatron_cream.planning.report import Comparison, summary
from megatron_cream.torchrun import ONE_NODE


def environment(layout: ParallelLayout) -> dict[str, str]:
    """Return the environment variables of NVIDIA's recipes for a run on ``layout``.

    ``examples/steps.sh`` sets the same, each with its reason.
    """
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if layout.gpus == 1:
        return variables
    variables |= {"NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0"}
    variables |= {f"NVTE_{way}_LAYERNORM_SM_MARGIN": "16" for way in ("FWD", "BWD")}
    sends = layout.tensor > 1 or layout.context > 1
    return {**variables, "CUDA_DEVICE_MAX_CONNECTIONS": "1" if sends else "8"}


def run_flags(
    shape: BaseModel,
    layout: ParallelLayout,
    work: Workload,
    target: int,
    iterations: int,
    tuning: Tuning = MEGATRON_DEFAULTS,
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
        "LAYOUT": layout_flags(layout, tuning) + expert_flags(shape, layout),
        "EXTENSION": [
            *("--seq-length", length, "--max-position-embeddings", length),
            *("--target-length", str(target), *_position_flags(work.seq_length, target)),
            *(["--dual-chunk"] if tuning.dual_chunk else []),
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
            *("--lr-warmup-iters", str(warm_up(iterations)), "--weight-decay", "0"),
        ],
        "CHECKPOINTS": [
            *("--pretrained-checkpoint", "$BASE", "--save", "$OUT", "--load", "$OUT"),
            *("--save-interval", "100", "--eval-interval", "100", "--eval-iters", "4"),
        ],
    }


def found_flags(found: Comparison) -> dict[str, list[str]]:
    """Return the flags of the short run of a plan, by theme."""
    plan = found.short
    return run_flags(
        found.shape, plan.layout, plan.work, found.target, found.iterations, found.tuning
    )


SAVE_RATE, MOST_SAVED = 2e9, 1e12
"""Bytes per second that saves may ask of a file system, and bytes that a run may leave there.

A script saves less often, and keeps its newest checkpoint alone, where it would ask for more.
"""


def saved_bytes(shape: BaseModel) -> int:
    """Return the size of a checkpoint with the optimizer's state."""
    return SAVED * shape.parameters


def save_interval(found: Comparison) -> int:
    """Return the iterations between saves: 100, or more where saves would come too fast."""
    fastest = saved_bytes(found.shape) / SAVE_RATE / found.short.step.total
    parts = (n for n in range(100, found.iterations) if found.iterations % n == 0 and n >= fastest)
    return next(parts, found.iterations)


def warm_up(iterations: int) -> int:
    """Return the steps of learning rate warm-up: CREAM's 10, or half of a shorter run."""
    return min(10, iterations // 2)


BF16_GRADIENTS, BF16_MOMENTS = 2, 6
"""Bytes per parameter: of the gradients' buffer; of what is left of an fp32 copy beside the bf16
weight, and of two moments in bf16, which is the variant of the optimizer that is planned."""


def layout_flags(layout: ParallelLayout, tuning: Tuning = MEGATRON_DEFAULTS) -> list[str]:
    """Return Megatron's flags for a layout; the data parallel size is what remains."""
    flags = ["--tensor-model-parallel-size", str(layout.tensor)]
    flags += ["--sequence-parallel"] if layout.tensor > 1 else []
    flags += ["--tp-comm-overlap"] if layout.tensor > 1 and tuning.tp_overlap else []
    flags += ["--pipeline-model-parallel-size", str(layout.pipeline)]
    if layout.virtual > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", str(layout.virtual)]
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
        method = "uniform" if layout.recompute_layers is None else "block"
        flags += ["--recompute-granularity", "full", "--recompute-method", method]
        flags += ["--recompute-num-layers", str(layout.recompute_layers or 1)]
    if tuning.gradient_bytes == BF16_GRADIENTS:
        flags += ["--grad-reduce-in-bf16"]
    if tuning.optimizer_bytes == BF16_MOMENTS:
        flags += ["--use-precision-aware-optimizer"]
        flags += ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
    flags += [] if tuning.fused_gradients else ["--no-gradient-accumulation-fusion"]
    if tuning.fp8:
        flags += ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    return flags


def expert_flags(shape: BaseModel, layout: ParallelLayout) -> list[str]:
    """Return Megatron's flags for a layer of experts: how it is spread, and trained.

    Each rank has whole experts (--expert-tensor-parallel-size 1), which reach further than parts of
    all. The router's loss that keeps experts evenly busy has the weight of Megatron's own examples.
    """
    if not shape.experts:
        return []
    flags = [
        "--expert-model-parallel-size",
        str(layout.expert),
        "--expert-tensor-parallel-size",
        "1",
    ]
    flags += ["--moe-token-dispatcher-type", "alltoall"]
    return [*flags, "--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"]


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


def script(flags: dict[str, list[str]], layout: ParallelLayout, gpus_per_node: int) -> str:
    """Return bash that starts the run; the same on every node but for ``NODE``."""
    gpus = layout.gpus
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
            *(f"export {name}=${{{name}:-{value}}}" for name, value in environment(layout).items()),
            f"LAUNCH=({launch})",
            *arrays,
            'torchrun "${LAUNCH[@]}" -m megatron_cream.pretrain \\',
            f"    {' '.join(names[:half])} \\",
            f"    {' '.join(names[half:])}",
        ]
    )


def _quote(flag: str) -> str:
    return f'"{flag}"' if flag.startswith("$") or "," in flag else flag


@dataclass(frozen=True)
class LaunchScript:
    """What a launch script says beside the plan.

    Attributes:
        command: the words after ``megatron-cream plan`` by which it was planned.
        name: of the model, for the folders of its checkpoints and runs.
        hf: repository or folder that it is imported from.
        title: what is extended, for people.
        gpu: kind of GPU, for people.
        notes: lines of comment.
        variables: shell variables with other defaults than the plan has.
        data: example of a dataset, for people.
        more: flags that the plan does not have, by the array of ``common.sh`` that takes them.
    """

    command: str
    name: str
    hf: str
    title: str
    gpu: str
    notes: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    data: str = "data/books"
    more: Mapping[str, str] = field(default_factory=dict)

    def text(self, found: Comparison, path: Path) -> str:
        """Return the script that starts the run of a plan; it is to stand at ``path``.

        Raises:
            UserError: ``path`` is not below a folder with ``common.sh``.
        """
        common = _common_script(path)
        flags = found_flags(found)
        lines = [
            "#!/usr/bin/env bash",
            "# SPDX-License-Identifier: Apache-2.0",
            *(f"# {line}" for line in (self._title(found), *self.notes)),
            "#",
            f"# megatron-cream plan {self.command}",
            f"#   {summary(found)}",
            "#",
            f"#   DATA={self.data} {path.relative_to(common.parents[1])}",
            "set -euo pipefail",
            "",
            *_variables(self, found, flags["ROPE"]),
            "",
            f"# shellcheck source={os.path.relpath(common, path.parent)}",
            f'source "$(dirname "${{BASH_SOURCE[0]}}")/{os.path.relpath(common, path.parent)}"',
            "",
            *_array("MODEL_ARGS", flags["SIZE"], flags["KIND"], megatron_flags(found.shape)[2]),
            "",
            *_array("PARALLEL_ARGS", flags["LAYOUT"]),
            "",
            *(f"{array}+=({flags})" for array, flags in self.more.items()),
            *([""] if self.more else []),
            *_fp8_lines(found),
            'extend "$@"',
        ]
        return "\n".join(lines) + "\n"

    def _title(self, found: Comparison) -> str:
        cluster, length = found.cluster, found.short.work.seq_length
        nodes = cluster.gpus // cluster.gpus_per_node
        where = f"{cluster.gpus} {self.gpu.upper()}"
        where += f", {nodes} nodes of {cluster.gpus_per_node}" if nodes > 1 else ""
        return f"{self.title} to {found.target // 1024}K on {where}, trained at {length} tokens."


def _fp8_lines(found: Comparison) -> list[str]:
    """Lines that FP8=1 needs beside its two flags, to fit the memory on the same layout."""
    plan, tuning = found.short, replace(found.tuning, fp8=True)
    needed = peak_memory(found.shape, plan.layout, plan.work, tuning).total
    if tuning.gradient_bytes == BF16_GRADIENTS or needed <= found.cluster.memory * GIB:
        return []
    return [
        "# With FP8=1 its copies of the weights leave no room for gradients in fp32.",
        "FP8_ARGS+=(--grad-reduce-in-bf16)",
        "",
    ]


def validate_script_path(path: Path) -> None:
    """Check where a launch script is to go.

    Raises:
        UserError: something is there, or ``common.sh`` is in no folder above it.
    """
    if os.path.lexists(path):
        raise UserError(f"--script is {path}: it exists; give another name")
    _common_script(path.resolve())


def _common_script(path: Path) -> Path:
    """Return the file that launch scripts source, in a folder above ``path``."""
    for folder in path.parents:
        if (folder / "common.sh").is_file():
            return folder / "common.sh"
    raise UserError(f"--script is {path}: it must be below the folder examples/ of a checkout")


def _variables(script: LaunchScript, found: Comparison, rope: list[str]) -> list[str]:
    """Shell variables; those that have their default in ``common.sh`` can be set from outside."""
    cluster, work = found.cluster, found.short.work
    given = dict(zip(rope, rope[1:], strict=False))
    fixed = {
        "NAME": script.name,
        "HF": f"${{HF:-{script.hf}}}",
        "TARGET_LENGTH": str(found.target),
        "ORIGINAL_LENGTH": given["--original-length"],
        "VOCAB_SIZE": str(found.shape.vocabulary),
    }
    save = save_interval(found)
    keeps_all = saved_bytes(found.shape) * found.iterations / save < MOST_SAVED
    planned = {
        "METHOD": _position_flags(work.seq_length, found.target)[1],
        "ROPE": given.get("--rope-interpolation", ""),
        "NODES": str(-(-cluster.gpus // cluster.gpus_per_node)),
        "GPUS_PER_NODE": str(min(cluster.gpus, cluster.gpus_per_node)),
        "SEQ_LENGTH": str(work.seq_length),
        "MICRO_BATCH": str(work.micro_batch),
        "GLOBAL_BATCH": str(work.global_batch),
        "ITERATIONS": str(found.iterations),
        "WARMUP": str(warm_up(found.iterations)),
        "SAVE_INTERVAL": str(save),
        "CHECKPOINT_GB": f"{saved_bytes(found.shape) / 1e9:.0f}",
        "GPU_KIND": script.gpu,
        **script.variables,
    }
    if not keeps_all:
        # Kept are those of every so many iterations: the last, and the newest before it. The
        # variable is not the user's, so that common.sh knows who decided to remove others.
        fixed["PLANNED_RETAIN_INTERVAL"] = str(found.iterations)
    changed = {k: value for k, value in planned.items() if value != COMMON_DEFAULTS.get(k)}
    lines = [f"{name}={value}" for name, value in fixed.items()]
    return lines + [f"{name}=${{{name}:-{value}}}" for name, value in changed.items()]


COMMON_DEFAULTS = {
    **{"METHOD": "cream", "ROPE": "", "NODES": "1", "GPUS_PER_NODE": "8", "SEQ_LENGTH": "4096"},
    **{"MICRO_BATCH": "1", "GLOBAL_BATCH": "32", "ITERATIONS": "1000", "WARMUP": "10"},
    **{"SAVE_INTERVAL": "100", "GPU_KIND": "h100"},
}
"""What ``examples/common.sh`` takes for variables that a script does not set."""


def _array(name: str, *themes: list[str]) -> list[str]:
    """Return a bash array; each theme begins a line, and no flag is parted from its values."""
    lines = [f"{name}=("]
    for theme in themes:
        row = ""
        for word in _with_values(theme):
            if row and len(row) + len(word) > 95:
                lines.append(row)
                row = ""
            row = f"{row} {word}" if row else f"    {word}"
        lines.append(row)
    return [*lines, ")"]


def _with_values(flags: list[str]) -> list[str]:
    """Join each flag with its values."""
    joined: list[str] = []
    for word in flags:
        if word.startswith("--"):
            joined.append(word)
        else:
            joined[-1] += f" {word}"
    return joined
