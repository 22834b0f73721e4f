# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream plan``: its flags, and the plan that it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, Tuning, Workload
from megatron_cream.planning.cost import GPUS, Gpu, product_share
from megatron_cream.planning.models import RESERVE_GIB, BaseModel, find_model, hub_name, title_of
from megatron_cream.planning.propose import Cluster, Plan, propose
from megatron_cream.planning.report import CheckPublished, Comparison, plain_values, table
from megatron_cream.planning.script import (
    BF16_GRADIENTS,
    BF16_MOMENTS,
    LaunchScript,
    found_flags,
    validate_script_path,
)
from megatron_cream.planning.script import argv as run_argv
from megatron_cream.planning.script import script as bash

EXAMPLES = """
    megatron-cream plan llama-2-70b --gpus 64 --target-length 262144
    megatron-cream plan path/to/hf-model --gpus 8 --gpu h200 --target-length 131072 --check

MODEL is a name (llama-2-7b, llama-3.1-70b, mistral-7b, qwen2.5-32b ...) or a Hugging Face folder.
--check builds every pipeline stage rank by rank in this process, without a GPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="name, or folder with a config.json")
    add("--gpus", type=_positive, required=True, help="in all")
    add("--target-length", type=_positive, required=True, metavar="T", help="in tokens")
    seq_help = "trained window in tokens (default: 4096)"
    inside_help = "allow a T that the model was already released with"
    add("--inside-window", action="store_true", help=inside_help)
    add("--seq-length", type=_positive, default=4096, metavar="N", help=seq_help)
    add("--train-iters", type=_positive, default=1000, help="steps, CREAM's (default: 1000)")
    batch_help = "samples per step, CREAM's (default: 32)"
    add("--global-batch-size", type=_positive, default=32, help=batch_help)
    add(
        "--micro-batch-size",
        type=_positive,
        help="samples per pass (default: the fastest of 1, 2, 4 and 8)",
    )
    add("--gpu", choices=tuple(GPUS), default="h100", help="SXM part (default: h100)")
    _add_machine(add)
    for name in ("tensor-model", "pipeline-model", "context", "expert-model"):
        add(f"--{name}-parallel-size", type=_positive, help="of the CREAM run (default: chosen)")
    virtual_help = "virtual stages per pipeline rank, 1 for none (default: chosen)"
    add("--num-virtual-stages-per-pipeline-rank", type=_positive, help=virtual_help)
    _add_tuning(add)
    add("--json", type=Path, metavar="FILE", help="write the plan there as well")
    script_help = "write a launch script there, below examples/ of a checkout"
    add("--script", type=Path, metavar="FILE", help=script_help)
    add("--check", action="store_true", help="build the stages of the plan")


def _add_tuning(add: Callable[..., Any]) -> None:
    """Add the options of a run that change its speed."""
    add("--fp8", action="store_true", help="FP8 products in the layers, one scale per tensor")
    overlap_help = "products run beside what tensor parallelism sends"
    add("--tp-comm-overlap", action="store_true", help=overlap_help)
    gradients_help = "gradients are added up and sent in bf16"
    add("--grad-reduce-in-bf16", action="store_true", help=gradients_help)
    optimizer_help = "what bf16 weights lack of fp32 is kept, and moments in bf16"
    add("--use-precision-aware-optimizer", action="store_true", help=optimizer_help)
    add("--dual-chunk", action="store_true", help="dual chunk attention at plain positions, N = T")
    fusion_help = "Apex is missing: weight gradients are added up by a kernel of its own"
    add("--no-gradient-accumulation-fusion", action="store_true", help=fusion_help)
    published_help = "print the plans of published runs beside what was measured, and end"
    add("--check-published", action=CheckPublished, help=published_help)


def _add_machine(add: Callable[..., Any]) -> None:
    """Add the figures of GPUs and network, each with those of every ``--gpu``."""
    add("--gpus-per-node", type=_positive, default=8, help="joined by fast links (default: 8)")
    add(
        "--gpu-memory",
        type=_amount,
        metavar="GIB",
        help=f"of each (default: that of --gpu, {_figures('memory')})",
    )
    add(
        "--reserve",
        type=_amount,
        default=RESERVE_GIB,
        metavar="GIB",
        help=f"left free of it (default: {RESERVE_GIB:g})",
    )
    add(
        "--peak-tflops",
        type=_amount,
        metavar="TFLOP/s",
        help=f"bf16, dense (default: that of --gpu, {_figures('tflops')})",
    )
    add(
        "--network-bandwidth",
        type=_amount,
        metavar="GB/s",
        help=f"per GPU to other nodes, one way (default: that of --gpu, {_figures('network_gbs')})",
    )
    add(
        "--launch-ms",
        type=_amount,
        metavar="MS",
        help="host's time to launch a layer of a micro-batch (default: that of --gpu, "
        f"{_figures('launch_ms')})",
    )
    add(
        "--mfu",
        type=_amount,
        metavar="SHARE",
        default=product_share(),
        help="share of the bf16 peak that matrix products reach (default: "
        f"{product_share():.3f}, measured on layers of Llama-2-7B on one H200)",
    )


def _figures(field: str) -> str:
    return ", ".join(f"{name} {getattr(gpu, field):g}" for name, gpu in GPUS.items())


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(
            f"is {text[:40]}: it must be a whole number of at least 1 and at most {_MOST}"
        )
    return value


_MOST = 2**28
"""More GPUs, tokens, samples or steps than there will be."""


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 <= value <= 1e9:
        raise argparse.ArgumentTypeError(
            f"is {text[:40]}: it must be a positive number, from 1e-6 to 1e9"
        )
    return value


def run(args: argparse.Namespace) -> None:
    """Plan, print and, if asked to, write and check."""
    if args.script:
        validate_script_path(args.script)
    found = compare(args)
    flags = found_flags(found)
    command = bash(flags, found.short.layout, args.gpus_per_node)
    print(table(found))
    print(f"\n{command}")
    if args.json:
        args.json.write_text(json.dumps(plain_values(found, command), indent=2) + "\n")
    if args.script:
        args.script.write_text(launch_script(found, args), encoding="utf-8")
        args.script.chmod(0o755)
    if args.check:
        from megatron_cream.planning.stages import check_stages, stage_lines

        print()
        print("\n".join(stage_lines(check_stages(run_argv(flags), args.gpus))))


def compare(args: argparse.Namespace) -> Comparison:
    """Return the plan that a command line asks for, beside full-length training."""
    _validate(args)
    shape, cluster = find_model(args.model), _cluster(args)
    _validate_target(shape, args)
    tuning = _tuning(args)
    work = Workload(args.seq_length, args.global_batch_size, args.micro_batch_size or 1)
    short = propose(shape, cluster, work, _fixed(args), tuning, _micro_batches(args))
    full, why_not = _full_length(shape, cluster, args, tuning)
    steps = (args.target_length, args.train_iters)
    return Comparison(shape, cluster, short, full, why_not, *steps, tuning, _fixed(args))


def _tuning(args: argparse.Namespace) -> Tuning:
    return Tuning(
        args.fp8,
        args.tp_comm_overlap,
        not args.no_gradient_accumulation_fusion,
        BF16_GRADIENTS if args.grad_reduce_in_bf16 else MEGATRON_DEFAULTS.gradient_bytes,
        BF16_MOMENTS if args.use_precision_aware_optimizer else MEGATRON_DEFAULTS.optimizer_bytes,
        args.dual_chunk,
    )


def launch_script(found: Comparison, args: argparse.Namespace, **more: Any) -> str:
    """Return the launch script of a plan, which is to stand at ``args.script``.

    Args:
        more: fields of ``LaunchScript`` that are not as the command line has them.
    """
    hf = more.pop("hf", None) or hub_name(args.model)
    fields = {"command": command_of(args), "name": Path(args.model).name, "gpu": args.gpu}
    launch = LaunchScript(**{**fields, "hf": hf, "title": title_of(hf), **more})
    return launch.text(found, args.script.resolve())


def command_of(args: argparse.Namespace) -> str:
    """Return the command line of a plan again: what is not a default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [args.model]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or value == action.default or action.dest in _OUTPUTS:
            continue
        words += [action.option_strings[0], *([] if value is True else [str(value)])]
    return " ".join(words)


_OUTPUTS = ("help", "json", "script", "check", "check_published")

MICRO_BATCHES = (1, 2, 4, 8)
"""Sizes that are tried where none is given."""


def _micro_batches(args: argparse.Namespace) -> tuple[int, ...]:
    return () if args.micro_batch_size else MICRO_BATCHES


def _validate(args: argparse.Namespace) -> None:
    if args.target_length < args.seq_length:
        raise UserError(
            f"--target-length is {args.target_length}: it must be at least --seq-length "
            f"{args.seq_length}"
        )
    if args.dual_chunk and args.target_length != args.seq_length:
        raise UserError(
            f"--target-length is {args.target_length} with --dual-chunk: it must be --seq-length "
            f"{args.seq_length}, chunks are counted at plain positions"
        )
    if args.mfu > 1:
        raise UserError(f"--mfu is {args.mfu:g}: it must be at most 1, a share of the peak")
    if args.fp8 and not GPUS[args.gpu].fp8:
        raise UserError(f"--gpu is {args.gpu}: it has no FP8; leave out --fp8 or name another")
    for name in ("json", "script"):
        path = getattr(args, name)
        if path and not path.parent.is_dir():
            raise UserError(f"--{name} is {path}: its folder does not exist")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(
            f"--gpus is {args.gpus}: it must be a multiple of --gpus-per-node {args.gpus_per_node}"
        )


def _validate_target(shape: BaseModel, args: argparse.Namespace) -> None:
    if args.target_length <= shape.trained_length and not args.inside_window:
        raise UserError(
            f"--target-length is {args.target_length}: {shape.name} was released with "
            f"{shape.trained_length} tokens, T must be above; --inside-window plans it all the same"
        )


def _cluster(args: argparse.Namespace) -> Cluster:
    known = GPUS[args.gpu]
    memory = (args.gpu_memory or known.memory) - args.reserve
    if memory <= 0:
        raise UserError(f"--reserve is {args.reserve:g}: it must be less than --gpu-memory")
    gpu = Gpu(
        memory=args.gpu_memory or known.memory,
        tflops=args.peak_tflops or known.tflops,
        memory_gbs=known.memory_gbs,
        node_gbs=known.node_gbs,
        network_gbs=args.network_bandwidth or known.network_gbs,
        fp8=known.fp8,
        launch_ms=args.launch_ms or known.launch_ms,
    )
    return Cluster(args.gpus, gpu, memory, args.mfu, args.gpus_per_node)


def _fixed(args: argparse.Namespace) -> dict[str, int]:
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
        "virtual": args.num_virtual_stages_per_pipeline_rank,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def _full_length(
    shape: BaseModel, cluster: Cluster, args: argparse.Namespace, tuning: Tuning
) -> tuple[Plan | None, str]:
    """Return the plan at T tokens, or why there is none: the CREAM run does not depend on it."""
    work = Workload(args.target_length, args.global_batch_size, args.micro_batch_size or 1)
    try:
        return propose(shape, cluster, work, None, tuning, _micro_batches(args)), ""
    except UserError as error:
        return None, str(error)
