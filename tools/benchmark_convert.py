# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a conversion both ways, beside a copy of the same bytes on the same disk.

    python tools/benchmark_convert.py --folder /scratch/convert

Makes a checkpoint of Llama-2-7B's shape (13.5 GB; three times that of free disk is needed), copies,
imports and exports it, each in a process of its own with cold files and everything on the disk at
the end, compares the bytes, and removes it all. Fewer --layers make it smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from megatron_cream.checkpoint.hf_folder import HfWeights
from megatron_cream.checkpoint.hf_writer import TensorPlan, write_shards
from megatron_cream.checkpoint.model_shape import ModelShape, config_fields

_COPY = """
import os, shutil, sys
os.mkdir(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    target = os.path.join(sys.argv[2], name)
    shutil.copyfile(os.path.join(sys.argv[1], name), target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
"""
_IMPORT = """
import megatron.training.arguments
from megatron_cream.checkpoint.import_hf import import_checkpoint
import_checkpoint(sys.argv[1], sys.argv[2])
"""
_EXPORT = """
import megatron.core.dist_checkpointing
from megatron_cream.checkpoint.export_hf import export_checkpoint
export_checkpoint(sys.argv[1], sys.argv[2])
"""
_TIMED = """
import re, sys, time, warnings
warnings.simplefilter("ignore")
{imports}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
# Not ru_maxrss: that begins with the memory of the process that started this one.
with open("/proc/self/status") as file:
    print("measured", seconds, re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])
"""


def make_checkpoint(folder: Path, shape: ModelShape, window: int) -> int:
    """Write random bfloat16 weights of a shape; return their bytes."""
    folder.mkdir(parents=True)
    fields = config_fields(shape) | {
        "max_position_embeddings": window,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    plans = [
        TensorPlan(part.at(place), torch.bfloat16, shape.part_shape(part))
        for row, place in shape.places()
        for part in row.parts
    ]
    rng = np.random.default_rng(0)
    weights = (rng.integers(0, 0x4000, p.nbytes // 2, np.uint16).view(np.uint8) for p in plans)
    write_shards(folder, plans, 5_000_000_000, weights)
    return sum(plan.nbytes for plan in plans)


def run(code: str, source: Path, target: Path) -> tuple[float, float, float]:
    """Run a conversion in a process of its own.

    Returns:
        Seconds of the work, seconds of the process, and its peak memory in bytes, mapped pages
        of files included.
    """
    forget(source)
    imports, _, work = code.strip().rpartition("\n") if code is not _COPY else ("", "", code)
    program = _TIMED.format(imports=imports, work=work)
    start = time.perf_counter()
    command = [sys.executable, "-c", program, str(source), str(target)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise SystemExit(f"the process failed with status {child.returncode}")
    seconds, peak = child.stdout.rsplit("measured", 1)[1].split()
    return float(seconds), time.perf_counter() - start, int(peak) * 1024


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check_equal(one: Path, two: Path) -> int:
    """Compare all tensors bit by bit; return how many there are."""
    first, second = HfWeights(one), HfWeights(two)
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit("the export has other tensors than the source")
    for name, tensor in first.tensors.items():
        rows = [np.empty(tensor.shape[0] * tensor.row_bytes, np.uint8) for _ in range(2)]
        first.read_rows(name, 0, tensor.shape[0], rows[0])
        second.read_rows(name, 0, tensor.shape[0], rows[1])
        if not np.array_equal(*rows):
            raise SystemExit(f"{name} is not what it was")
    return len(first.tensors)


def main() -> None:
    """Print a table of seconds, GB/s, the ratio to a copy, and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="new folder on the disk to test")
    for flag, default, what in (
        ("--layers", 32, "of the model"),
        ("--hidden-size", 4096, "of the model"),
        ("--ffn-hidden-size", 11008, "of its feed-forward layers"),
        ("--heads", 32, "of attention"),
        ("--groups", 32, "key-value heads"),
        ("--vocabulary", 32000, "tokens"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default: {default})")
    args = parser.parse_args()
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        layers=args.layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.heads,
        groups=args.groups,
        head_dim=args.hidden_size // args.heads,
        vocabulary=args.vocabulary,
        norm_epsilon=1e-5,
        tied=False,
    )
    if args.folder.exists():
        parser.error(f"--folder is {args.folder}: it exists; it must be a new folder")
    try:
        print(benchmark(args.folder, shape))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def benchmark(folder: Path, shape: ModelShape) -> str:
    """Run copy, import and export in turn and return the table."""
    source, imported, exported = folder / "source", folder / "imported", folder / "exported"
    nbytes = make_checkpoint(source, shape, 4096)
    copies = [_copy_time(source, folder / "copy")]
    rows = []
    for name, code, begin, end in (
        ("import", _IMPORT, source, imported),
        ("export", _EXPORT, imported, exported),
    ):
        measured = run(code, begin, end)
        copies.append(_copy_time(source, folder / "copy"))
        rows.append((name, *measured, min(copies[-2:])))
    count = check_equal(source, exported)
    limit = 2 * 2**30 + 2 * _largest(shape)
    return "\n".join(
        [
            f"{nbytes / 1e9:.2f} GB in {count} tensors, equal bit by bit after import and export",
            f"copy: {', '.join(f'{nbytes / 1e9 / c:.2f}' for c in copies)} GB/s",
            "",
            "| | seconds | GB/s | of the copy's speed | with start-up, seconds | peak GiB |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {work:.1f} | {nbytes / 1e9 / work:.2f} | {copy / work:.2f} | "
                f"{process:.1f} | {peak / 2**30:.2f} |"
                for name, work, process, peak, copy in rows
            ),
            f"| allowed | | | 0.50 | | {limit / 2**30:.2f} |",
        ]
    )


def _copy_time(source: Path, target: Path) -> float:
    seconds = run(_COPY, source, target)[0]
    shutil.rmtree(target)
    return seconds


def _largest(shape: ModelShape) -> int:
    sizes = [np.prod(shape.part_shape(p), dtype=np.int64) for r in shape.rows() for p in r.parts]
    return 2 * int(max(sizes))


if __name__ == "__main__":
    main()
