# SPDX-License-Identifier: Apache-2.0
"""The layouts that layouts.py compares, and the small model that it trains."""

from dataclasses import dataclass

FLAGS = [
    *("--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8"),
    *("--group-query-attention", "--num-query-groups", "4"),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--target-length", "4096"),
    *("--position-embedding-type", "rope", "--no-create-attention-mask-in-dataloader"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "10", "--bf16"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-iters", "0", "--eval-interval", "100"),
    *("--split", "100,0,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"),
    *("--make-vocab-size-divisible-by", "64", "--num-workers", "0", "--log-interval", "1"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.05"),
    "--no-gradient-accumulation-fusion",
]

BF16 = 0.02  # of losses near 7; rounding of bf16 sums in another order
FP8 = 0.2
GRADIENT = 0.1  # of the norm of the first gradient of CLEX's weights


@dataclass(frozen=True)
class Layout:
    """A row: GPUs, Megatron's flags, and how far its losses may be from the reference's.

    Attributes:
        then: flags after iteration 5, from a checkpoint.
        role: ``reference`` of the rows up to the next one, or ``angles``, which says how far
            losses are apart when text is the same and angles are not.
        start: name of the run whose checkpoint has the first weights.
    """

    gpus: int
    flags: tuple[str, ...] = ()
    tolerance: float = BF16
    then: tuple[str, ...] | None = None
    role: str = ""
    start: str = "initial"


TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")  # makes middle stages of two GPUs
CP2 = ("--context-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
TE_LOSS = ("--te-cross-entropy",)
UNFUSED = ("--no-rope-fusion",)
OTHER_ANGLES = ("--rope-factor", "16")
PACKED = ("--sample-unit", "packed-documents", "--micro-batch-size", "1")
PLAIN = ("--plain-share", "0.5")
MIXED = (*PLAIN, "--mixed-windows")
DUAL_CHUNK = (
    *("--target-length", "512", "--original-length", "128", "--rope-interpolation", "none"),
    *("--position-strategy", "full", "--dual-chunk"),
)
CLEX = ("--rope-interpolation", "clex", "--position-strategy", "randpos")
# Frequencies answer to rounding: at 1e-3 two orders of the same sums are 0.2 apart in ten steps.
LOW = ("--lr", "1e-5", "--min-lr", "1e-6")


def _clex(gpus: int, *flags: str, role: str = "") -> Layout:
    return Layout(gpus, (*CLEX, *LOW, *flags), role=role, start="initial clex")


STARTS = {
    "initial": ("--train-iters", "1"),
    # So long that angles matter, and no weight is zero, as W_down is at first.
    "initial clex": (*CLEX, "--train-iters", "20"),
}
LAYOUTS = {
    "1 GPU": Layout(1, role="reference"),
    "1 GPU, TE's RoPE kernel": Layout(1, ("--rope-kernel", "te")),
    "1 GPU, unfused RoPE": Layout(1, UNFUSED),
    "1 GPU, micro-batch 1": Layout(1, ("--micro-batch-size", "1")),
    "1 GPU, TE cross entropy": Layout(1, TE_LOSS),
    "1 GPU, fp8": Layout(1, ("--fp8-format", "hybrid"), FP8),
    "DP2, distributed optimizer": Layout(2, ("--use-distributed-optimizer",)),
    "TP2, sequence parallel": Layout(2, TP2),
    "TP2, TE cross entropy": Layout(2, (*TP2, *TE_LOSS)),
    "PP2": Layout(2, PP2),
    "PP2, virtual stages": Layout(2, (*PP2, *VIRTUAL)),
    "PP2, then DP2 from its checkpoint": Layout(2, (*PP2, *SHARDED), then=SHARDED),
    "CP2": Layout(2, CP2),
    "CP2, unfused RoPE": Layout(2, (*CP2, *UNFUSED)),
    "other angles": Layout(1, OTHER_ANGLES, role="angles"),
    "packed documents, 1 GPU": Layout(1, PACKED, role="reference"),
    "packed, unfused RoPE": Layout(1, (*PACKED, *UNFUSED)),
    "packed, TP2, sequence parallel": Layout(2, (*PACKED, *TP2)),
    "packed, PP2": Layout(2, (*PACKED, *PP2)),
    "packed, PP2, virtual stages": Layout(2, (*PACKED, *PP2, *VIRTUAL)),
    "packed, CP2": Layout(2, (*PACKED, *CP2)),
    "packed, CP2, unfused RoPE": Layout(2, (*PACKED, *CP2, *UNFUSED)),
    "packed, other angles": Layout(1, (*PACKED, *OTHER_ANGLES), role="angles"),
    "mixed windows, 1 GPU": Layout(1, MIXED, role="reference"),
    "mixed windows, unfused RoPE": Layout(1, (*MIXED, *UNFUSED)),
    "mixed windows, PP2, virtual stages": Layout(2, (*MIXED, *PP2, *VIRTUAL)),
    "mixed windows, CP2": Layout(2, (*MIXED, *CP2)),
    "mixed windows, all interpolated": Layout(1, PLAIN, role="angles"),
    "packed mixed windows, 1 GPU": Layout(1, (*PACKED, *MIXED), role="reference"),
    "packed mixed windows, CP2": Layout(2, (*PACKED, *MIXED, *CP2)),
    "packed mixed windows, all interpolated": Layout(1, (*PACKED, *PLAIN), role="angles"),
    "dual chunk, 1 GPU": Layout(1, DUAL_CHUNK, role="reference"),
    "dual chunk, TP2, sequence parallel": Layout(2, (*DUAL_CHUNK, *TP2)),
    "dual chunk, PP2, virtual stages": Layout(2, (*DUAL_CHUNK, *PP2, *VIRTUAL)),
    "dual chunk, CP2": Layout(2, (*DUAL_CHUNK, *CP2)),
    "dual chunk, other sizes": Layout(1, (*DUAL_CHUNK, "chunk_size=32"), role="angles"),
    "packed, dual chunk, 1 GPU": Layout(1, (*PACKED, *DUAL_CHUNK), role="reference"),
    "packed, dual chunk, TP2": Layout(2, (*PACKED, *DUAL_CHUNK, *TP2)),
    "packed, dual chunk, CP2": Layout(2, (*PACKED, *DUAL_CHUNK, *CP2)),
    "packed, dual chunk, other sizes": Layout(
        1, (*PACKED, *DUAL_CHUNK, "chunk_size=32"), role="angles"
    ),
    "CLEX, 1 GPU": _clex(1, role="reference"),
    "CLEX, 1 GPU, micro-batch 1": _clex(1, "--micro-batch-size", "1"),
    "CLEX, DP2, distributed optimizer": _clex(2, "--use-distributed-optimizer"),
    "CLEX, TP2, sequence parallel": _clex(2, *TP2),
    "CLEX, PP2": _clex(2, *PP2),
    "CLEX, PP2, virtual stages": _clex(2, *PP2, *VIRTUAL),
    "CLEX, CP2": _clex(2, *CP2),
    "CLEX, other positions": _clex(1, "--position-seed", "7", role="angles"),
}
