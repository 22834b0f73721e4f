# SPDX-License-Identifier: Apache-2.0
"""Measure what per-sample positions cost in a training step on one GPU.

    python tools/benchmark_step.py

Forward and backward of a model of Llama-2-7B's layers (4 of them, and its head) in bf16 on 4096
random tokens: plain Megatron with its fused RoPE and positions 0 .. 4095, beside this package's
rotary with CREAM positions to 32768, another layout for every sample and step. The variants take
turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

SEQUENCE, TARGET, VOCABULARY = 4096, 32768, 32000


def main() -> int:
    """Print a row for each micro-batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=40, help="steps of each variant")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no GPU: this measures GPU kernels", file=sys.stderr)
        return 2
    variants = {
        "Megatron, fused": _model(args.layers, fused=True, ours=False),
        "ours, fused": _model(args.layers, fused=True, ours=True),
        "ours, unfused": _model(args.layers, fused=False, ours=True),
    }
    first = next(iter(variants))
    print(f"{torch.cuda.get_device_name()}, {args.layers} layers, {SEQUENCE} tokens, ms a step")
    print(f"{'micro-batch':>11}  {'variant':<16} {'median':>8} {'ratio':>7} {'its quartiles':>19}")
    for size in args.micro_batch_sizes:
        times = _measure(variants, size, args.steps)
        for name in variants:
            pairs = [a / b for a, b in zip(times[name], times[first], strict=True)]
            low, _, high = statistics.quantiles(pairs, n=4)
            median = statistics.median(times[name])
            ratio = statistics.median(pairs)
            print(f"{size:>11}  {name:<16} {median:>8.2f} {ratio:>7.4f} {low:>9.4f} {high:>9.4f}")
    return 0


def _measure(variants: dict[str, torch.nn.Module], size: int, steps: int) -> dict[str, list[float]]:
    from megatron_cream.positions import make_strategy

    strategy = make_strategy("cream", SEQUENCE, TARGET)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(-8, steps):  # the first ones compile kernels and fill caches
        tokens = torch.randint(VOCABULARY, (size, SEQUENCE), device="cuda")
        layouts = [strategy.layout(1, (step + 8) * size + i).position_ids for i in range(size)]
        pretended = torch.stack([torch.from_numpy(ids) for ids in layouts]).cuda()
        plain = torch.arange(SEQUENCE, device="cuda").expand(size, -1)
        # Who goes first changes, so that clocks and caches favour nobody.
        order = list(variants) if step % 2 else list(variants)[::-1]
        for name in order:
            positions = pretended if name.startswith("ours") else plain
            elapsed = _time(lambda m=variants[name], p=positions, t=tokens: _step(m, t, p))
            if step >= 0:
                times[name].append(elapsed)
    return times


def _step(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> None:
    loss = model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=tokens)
    loss.float().mean().backward()
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


def _model(layers: int, fused: bool, ours: bool) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig

    from megatron_cream.checkpoint.loading import initialize_one_process
    from megatron_cream.rope import install_rotary, make_scaling

    initialize_one_process()
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
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
    if ours:
        scaling = make_scaling(
            "linear", dim=128, factor=TARGET / SEQUENCE, original_length=SEQUENCE
        )
        install_rotary(model, scaling)
    return model


if __name__ == "__main__":
    sys.exit(main())
