# SPDX-License-Identifier: Apache-2.0
"""Measure what per-sample positions cost in a training step on one GPU.

    python tools/benchmark_step.py
    python tools/benchmark_step.py --clex --accumulate 1 8

Forward and backward of a model of Llama-2-7B's layers (4 of them, and its head) in bf16 on 4096
random tokens: plain Megatron with its fused RoPE and positions 0 .. 4095, beside this package's
rotary with CREAM positions to --target-length, another layout for every sample and step, turned by
the Triton kernel (--rope-kernel triton), by Transformer Engine's (te) and unfused. The variants
take turns; figures are medians. --query-groups 8 is attention with grouped queries.

With --clex it is linear interpolation beside CLEX at the same positions, another scale per sample,
its ODE and the gradient of its weights included. CLEX solves the ODE once per step of --accumulate
micro-batches, whatever the layers, so 4 of them and one micro-batch are the worst case; a larger
--target-length makes it longer.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

SEQUENCE, VOCABULARY = 4096, 32000


def main() -> int:
    """Print a row for each micro-batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = "samples of a pass (default: 1 4)"
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 4], help=sizes)
    parser.add_argument("--steps", type=int, default=40, help="of each variant (default: 40)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: 4)")
    parser.add_argument("--query-groups", type=int, default=32, help="of 32 heads (default: 32)")
    parser.add_argument("--clex", action="store_true", help="CLEX beside linear interpolation")
    parser.add_argument(
        "--accumulate", type=int, nargs="+", default=[1], help="micro-batches per step (default: 1)"
    )
    parser.add_argument(
        "--target-length", type=int, default=32768, help="T, tokens (default: 32768)"
    )
    args = parser.parse_args()
    if args.target_length <= SEQUENCE or args.target_length % SEQUENCE:
        print(
            f"error: --target-length {args.target_length}: needs a larger multiple of {SEQUENCE}",
            file=sys.stderr,
        )
        return 2
    if not torch.cuda.is_available():
        print("error: there is no GPU: this measures GPU kernels", file=sys.stderr)
        return 2
    variants = _variants(args)
    print(f"{torch.cuda.get_device_name()}, {args.layers} layers, {SEQUENCE} tokens, ms per step")
    print(
        f"{'micro-batch':>11}  {'a step':>6}  {'variant':<16} {'median':>8} {'ratio':>7} "
        f"{'its quartiles':>19}"
    )
    for size, count in itertools.product(args.micro_batch_sizes, args.accumulate):
        times = _measure(variants, size, count, args)
        for name in variants:
            print(f"{size:>11}  {count:>6}  {_row(name, times)}", flush=True)
    return 0


def _variants(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Return models by name; the first one is what the others are compared with."""
    if args.clex:
        return {
            "linear, fused": _model(args, fused=True, interpolation="linear"),
            "CLEX, fused": _model(args, fused=True, interpolation="clex"),
        }
    return {
        "Megatron, fused": _model(args, fused=True),
        "ours, triton": _model(args, fused=True, interpolation="linear", triton=True),
        "ours, te": _model(args, fused=True, interpolation="linear"),
        "ours, unfused": _model(args, fused=False, interpolation="linear"),
    }


def _row(name: str, times: dict[str, list[float]]) -> str:
    first = next(iter(times))
    pairs = [a / b for a, b in zip(times[name], times[first], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    median, ratio = statistics.median(times[name]), statistics.median(pairs)
    return f"{name:<16} {median:>8.2f} {ratio:>7.4f} {low:>9.4f} {high:>9.4f}"


def _measure(
    variants: dict[str, torch.nn.Module], size: int, count: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    from megatron_cream.positions import make_strategy

    strategy = make_strategy("cream", SEQUENCE, args.target_length)
    largest = args.target_length // SEQUENCE
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(-8, args.steps):  # the first ones compile kernels and fill caches
        tokens = torch.randint(VOCABULARY, (size, SEQUENCE), device="cuda")
        layouts = [strategy.layout(1, (step + 8) * size + i).position_ids for i in range(size)]
        pretended = torch.stack([torch.from_numpy(ids) for ids in layouts]).cuda()
        scales = torch.randint(1, largest + 1, (count, size), device="cuda").float()
        plain = torch.arange(SEQUENCE, device="cuda").expand(size, -1)
        # Who goes first changes, so that clocks and caches favour nobody.
        order = list(variants) if step % 2 else list(variants)[::-1]
        for name in order:
            positions = plain if name.startswith("Megatron") else pretended
            elapsed = _time(partial(_step, variants[name], tokens, positions, scales))
            if step >= 0:
                times[name].append(elapsed)
    return times


def _step(
    model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor, scales: torch.Tensor
) -> None:
    """Forward and backward; ``scales`` ``[micro-batches, b]``, of which CLEX uses the values."""
    clex = hasattr(model.rotary_pos_emb, "set_scales")
    for drawn in scales:
        if clex:
            model.rotary_pos_emb.set_scales(drawn)
        loss = model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=tokens)
        loss.float().mean().backward()
    if clex:
        from megatron_cream.extras.clex.trained_rotary import weights_gradient

        table = model.rotary_pos_emb.table
        weights_gradient(table, float(len(scales)))
        table.finite().item()  # the trainer looks at it once per step
        table.forget()
    for parameter in model.parameters():
        parameter.grad = None


def _time(run: Callable[[], None]) -> float:
    """Milliseconds on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _model(
    args: argparse.Namespace, fused: bool, interpolation: str | None = None, triton: bool = False
) -> torch.nn.Module:
    """Return a model with our rotary and an interpolation, or Megatron's own rotary for None."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.extras.rotation import use_triton
    from megatron_cream.mcore.build_model import initialize_ranks
    from megatron_cream.mcore.rotary import install_rotary
    from megatron_cream.rope import make_scaling

    initialize_ranks()
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=args.query_groups,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=fused,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    ).cuda()
    if interpolation is not None:
        factor = args.target_length / SEQUENCE
        scaling = make_scaling(interpolation, dim=128, factor=factor, original_length=SEQUENCE)
        install_rotary(model, scaling)
    if triton:
        use_triton(model)
    return model


if __name__ == "__main__":
    sys.exit(main())
