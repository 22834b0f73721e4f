# SPDX-License-Identifier: Apache-2.0
"""Layouts divide what they split; memory and time against Megatron, torch and a GPU's own."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload
from megatron_cream.planning import cost, propose
from megatron_cream.planning import models as memory
from megatron_cream.planning.models import MODELS, padded_vocab
from megatron_cream.planning.propose import SHORTEST_SLICE, layouts, uneven_ends

LLAMA, LLAMA_70B, SMOL = (MODELS[n] for n in ("llama-2-7b", "llama-2-70b", "smollm2-135m"))
CREAM = Workload(4096, 32)


@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
@pytest.mark.parametrize("work", [CREAM, Workload(131072, 32, 2)])
def test_layouts_divide_what_they_split(shape, work):
    found = list(layouts(shape, 48, work))
    assert len(set(found)) == len(found) > 0
    for layout in found:
        assert layout.gpus == 48 and layout.tensor <= 8
        if layout.virtual > 1:
            assert shape.layers % (layout.pipeline * layout.virtual) == 0 < layout.pipeline - 1
            assert layout.micro_batches(work) % layout.pipeline == 0
        assert shape.heads % layout.tensor == shape.groups % layout.tensor == 0
        assert work.global_batch % (work.micro_batch * layout.data) == 0
        if layout.context > 1:
            assert work.seq_length % (2 * layout.context) == 0
            assert work.seq_length // layout.context >= SHORTEST_SLICE
        stages = layout.stages(shape.layers)
        assert sorted(itertools.chain(*stages)) == list(range(shape.layers))
        assert len(stages) == layout.pipeline and all(stages)


def test_virtual_stages_are_tried():
    found = {p.virtual for p in layouts(LLAMA_70B, 32, CREAM, fixed={"tensor": 4, "pipeline": 4})}
    assert found == {1, 2, 4, 5, 10, 20}
    five = layouts(LLAMA_70B, 32, CREAM, fixed={"virtual": 5})
    assert {(p.virtual, p.pipeline > 1) for p in five} == {(5, True)}


def test_given_sizes_are_kept():
    fixed = {"tensor": 8, "pipeline": 8}
    found = list(layouts(LLAMA_70B, 1024, CREAM, fixed=fixed))
    assert {(p.tensor, p.pipeline, p.data) for p in found} == {(8, 8, 16)}
    context = list(layouts(LLAMA_70B, 64, CREAM, fixed={"context": 4}))
    assert {p.context for p in context} == {4}


@pytest.mark.parametrize(
    ("layers", "stages", "ends"),
    [
        (80, 8, (None, None)),
        (28, 8, (2, 2)),
        (30, 4, (7, 7)),
        (31, 4, (8, 7)),
        (5, 8, None),
        (9, 8, None),
    ],
)
def test_uneven_ends(layers, stages, ends):
    assert uneven_ends(layers, stages) == ends


def test_a_split_that_does_not_work_out():
    with pytest.raises(ValueError, match="30 layers cannot be split over 4 pipeline stages"):
        ParallelLayout(1, 4, 1, 1).stages(30)
    assert ParallelLayout(1, 2, virtual=2).stages(8) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(ValueError, match="30 layers cannot be split evenly over 4 pipeline stages"):
        ParallelLayout(1, 4, virtual=2).stages(30)
    with pytest.raises(ValueError, match="25 layers for 2 stages"):
        ParallelLayout(1, 4, 1, 1, 3, 2).stages(30)


@pytest.mark.parametrize("shape", [LLAMA, MODELS["qwen2.5-7b"], SMOL], ids=lambda s: s.name)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (1, 2), (1, 4)])
def test_parameters_of_stages_add_up(shape, tensor, pipeline):
    layout = ParallelLayout(tensor, pipeline, 1, 1, *uneven_ends(shape.layers, pipeline))
    held = sum(memory.stage_parameters(shape, layout, s) for s in range(pipeline))
    copies = 1 if shape.tied and pipeline > 1 else 0
    padding = (padded_vocab(shape, tensor) - shape.vocabulary) * shape.hidden
    tables = 1 if shape.tied else 2
    assert held == shape.parameters + tables * padding + copies * shape.vocabulary * shape.hidden


# H200s, Megatron's trainer at micro-batch 1 of 4096 tokens, 8 samples per step: GiB that PyTorch
# had allocated at the peak on the fullest, and seconds of a step. docs/planning.md.
MEASURED = [
    ("llama-2-7b", 4, ParallelLayout(1, 1, 1, 1), 20.87, 0.408),
    ("llama-2-7b", 8, ParallelLayout(1, 1, 1, 1, recompute=True), 32.68, 0.925),
    ("llama-3-8b", 4, ParallelLayout(1, 1, 1, 1), 37.46, 0.621),
    ("llama-2-7b", 8, ParallelLayout(1, 1, 1, 2), 25.94, 0.400),
    ("llama-2-7b", 8, ParallelLayout(2, 1, 1, 1), 18.30, 0.481),
    ("llama-2-7b", 8, ParallelLayout(1, 2, 1, 1), 20.02, 0.445),
]


@pytest.mark.parametrize(("name", "layers", "layout", "gib", "seconds"), MEASURED)
def test_estimates_are_near_what_gpus_did(name, layers, layout, gib, seconds):
    shape, work = dataclasses.replace(MODELS[name], layers=layers), Workload(4096, 8)
    peak = memory.peak_memory(shape, layout, work).total / memory.GIB
    assert peak == pytest.approx(gib, rel=0.015)
    apart = Tuning(fused_gradients=False)
    speed = (cost.GPUS["h200"], cost.product_share(), 8, apart)
    step = cost.step_time(shape, layout, work, *speed).total
    assert 0.75 < step / seconds < 1.0  # what is not counted takes time


def test_memory_of_micro_batches_in_flight():
    layout = ParallelLayout(8, 8, 1, 1)
    stages = [memory.stage_memory(LLAMA_70B, layout, CREAM, stage) for stage in range(8)]
    one = 10 * 4096 * memory.layer_activations(LLAMA_70B, 8)
    assert [round(s.activations / one, 6) for s in stages] == [8, 7, 6, 5, 4, 3, 2, 1]
    few = Workload(4096, 3)
    assert memory.stage_memory(LLAMA_70B, layout, few, 0).activations == 3 * one
    again = dataclasses.replace(layout, recompute=True)
    kept = memory.stage_memory(LLAMA_70B, again, CREAM, 0).activations
    assert kept == 8 * 10 * 4096 * 2 * 8192 / 8


def test_layers_are_recomputed_in_part():
    """2 of the 5 layers of each of 4 virtual stages: two fifths of the memory and time of all."""
    layout, work = ParallelLayout(4, 4, 1, 2, virtual=4), Workload(4096, 32)
    full = dataclasses.replace(layout, recompute=True)
    part = dataclasses.replace(full, recompute_layers=2)
    kept, some, none = (
        memory.stage_memory(LLAMA_70B, x, work, 0).activations for x in (layout, part, full)
    )
    assert kept - some == pytest.approx(0.4 * (kept - none))
    fast, some, slow = (
        cost.step_time(LLAMA_70B, x, work, cost.GPUS["h100"], 0.6).kernels
        for x in (layout, part, full)
    )
    assert some - fast == pytest.approx(0.4 * (slow - fast))
    assert str(part).endswith("recompute 2") and str(full).endswith("recompute")


def test_as_few_layers_are_recomputed_as_fit():
    tight = propose.Cluster(8, cost.GPUS["h100"], 60.0, 0.6)
    found = propose.propose(LLAMA, tight, CREAM, {"tensor": 1, "pipeline": 1})
    assert 0 < found.layout.recompute_layers < 32
    fewer = dataclasses.replace(found.layout, recompute_layers=found.layout.recompute_layers - 1)
    least = memory.peak_memory(LLAMA, fewer, CREAM).total
    assert found.memory.total <= 60 * memory.GIB < least


def test_bytes_of_gradients_and_optimizer():
    """Memory, what replicas send and what the update passes over all follow the variant."""
    gpu, layout = cost.GPUS["h100"], ParallelLayout(1, 1, 1, 8)
    small = Tuning(gradient_bytes=2, optimizer_bytes=6)
    held = memory.stage_parameters(LLAMA, layout, 0)
    part = memory.stage_memory(LLAMA, layout, CREAM, 0, tuning=small)
    assert (part.gradients, part.optimizer) == (2 * held, 6 * held / 8)
    sent = cost.replica_seconds(LLAMA, layout, gpu, tuning=small)
    assert sent == pytest.approx(4 / 6 * cost.replica_seconds(LLAMA, layout, gpu))
    step = cost.step_time(LLAMA, layout, CREAM, gpu, 0.6, tuning=small)
    assert step.update == pytest.approx(held * (2 + (2 + 6 + 6 + 2) / 8) / (0.85 * 3350e9))


def test_the_telling_stages_tell_all():
    for layout in (ParallelLayout(1, 4, 1, 2, 2, 1), ParallelLayout(2, 5), ParallelLayout(2, 2)):
        shape, work = dataclasses.replace(LLAMA, layers=11 if layout.first_layers else 40), CREAM
        whole = range(layout.pipeline)
        counts = [layout.layers_of(s, shape.layers) for s in whole]
        assert counts == [len(layers) for layers in layout.stages(shape.layers)]
        most = max(memory.stage_memory(shape, layout, work, s).total for s in whole)
        assert memory.peak_memory(shape, layout, work).total == most
        most = max(memory.stage_parameters(shape, layout, s) for s in whole)
        largest = memory.largest_stage(shape, layout)
        assert memory.stage_parameters(shape, layout, largest) == most


def test_optimizer_is_shared_by_data_and_context_parallel_ranks():
    alone, shared = ParallelLayout(8, 1, 1, 1), ParallelLayout(8, 1, 4, 2)
    long = Workload(131072, 2)
    whole = memory.stage_memory(LLAMA_70B, alone, long, 0)
    part = memory.stage_memory(LLAMA_70B, shared, long, 0)
    assert part.optimizer == whole.optimizer / 8
    assert part.weights == whole.weights and part.gradients == whole.gradients
    assert part.activations == whole.activations / 4


def test_flops_are_those_that_torch_counts():
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attn_implementation="eager",
    )
    shape = dataclasses.replace(
        LLAMA, layers=3, hidden=64, ffn=160, heads=4, groups=2, head_dim=16, vocabulary=512
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(512, (1, 128))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    # Eager attention computes the other half of the square as well, and throws it away. The
    # angles are a product of matrices there, of a few operations a token.
    both_halves = 6 * 128 * 64 * 3 * 128
    expected = 128 * cost.model_flops(shape, 128) + both_halves
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_share_of_products():
    """Of 176.62 ms attention (6.6 TFLOP) and 45 GB of other traffic leave 153 to 92.5 TFLOP."""
    attention = 6 * 4096 * 4096 * 4 * 16384 / (989.4e12 * 0.5)
    traffic = 44 * 4096 + 8 * 8192 + 16 * 11008
    others = (4 * traffic + 30 * 32000) * 16384 / (4800e9 * 0.85)
    left = 0.17662 - attention - others
    products = 6 * (4 * memory.layer_matrices(LLAMA) + 32000 * 4096) * 16384
    assert cost.product_share() == pytest.approx(products / left / 989.4e12)
    assert 0.60 < cost.product_share() < 0.63


def test_a_micro_batch_measured_is_a_micro_batch_planned():
    """The kernels of that measurement, put together again."""
    shape = dataclasses.replace(LLAMA, layers=4)
    work, share = Workload(4096, 4, 4), cost.product_share()
    kernels = cost.kernel_seconds(shape, ParallelLayout(), work, cost.GPUS["h200"], share)
    assert kernels == pytest.approx(0.17662)


def test_pipeline_ends_are_idle():
    step = cost.step_time(LLAMA_70B, ParallelLayout(8, 8, 1, 1), CREAM, cost.GPUS["h100"], 0.5)
    busy = step.kernels + step.communication + step.launches
    assert step.bubble / busy == pytest.approx(7 / 32)
    again = ParallelLayout(8, 8, 1, 1, recompute=True)
    slower = cost.step_time(LLAMA_70B, again, CREAM, cost.GPUS["h100"], 0.5)
    assert 1.3 < slower.kernels / step.kernels < 4 / 3  # the output layer is not run again


def test_interleaving_divides_the_bubble_and_sends_more():
    gpu, work = cost.GPUS["h100"], Workload(4096, 32)
    plain, five = (
        cost.step_time(LLAMA_70B, ParallelLayout(4, 4, 1, 2, virtual=v), work, gpu, 0.6)
        for v in (1, 5)
    )
    sent = 2 * (2 * 4096 * 8192) / 4 / 40e9  # of a micro-batch, between nodes
    assert five.communication - plain.communication == pytest.approx(16 * sent * (5 / 2 - 1))
    assert five.kernels == plain.kernels
    assert five.bubble == pytest.approx((plain.bubble + 3 * sent * (5 / 2 - 1)) / 5)


def test_interleaving_keeps_more_in_flight():
    """The first of 4 stages with 5 pieces: 6 + 16 forward before the first backward, and one."""
    five, work = ParallelLayout(4, 4, 1, 2, virtual=5), Workload(4096, 32)
    assert [five.in_flight(work, stage) for stage in range(4)] == [23 / 5, 21 / 5, 19 / 5, 17 / 5]
    assert five.in_flight(Workload(4096, 8), 0) == 4, "no more than there are"
    plain = dataclasses.replace(five, virtual=1)
    kept = [memory.stage_memory(LLAMA_70B, x, work, 0).activations for x in (plain, five)]
    assert kept[1] / kept[0] == pytest.approx(23 / 20)


def test_a_step_is_no_shorter_than_its_launches():
    gpu = cost.GPUS["h100"]
    few = cost.step_time(LLAMA, ParallelLayout(8), Workload(4096, 8), gpu, 0.6)
    assert few.launches > 0
    assert few.kernels + few.communication + few.launches == pytest.approx(8 * 32 * 3.1e-3)
    again = cost.step_time(LLAMA, ParallelLayout(8, recompute=True), Workload(4096, 8), gpu, 0.6)
    assert again.kernels + again.communication + again.launches == pytest.approx(
        8 * 32 * 3.1e-3 * 4 / 3
    )
    slow = dataclasses.replace(gpu, launch_ms=7.2)
    ring = cost.step_time(LLAMA, ParallelLayout(8, 1, 3), Workload(4098, 8), slow, 0.6)
    waits = ring.kernels + ring.communication + ring.launches
    exposed = cost.OVERLAP * cost.replica_seconds(LLAMA, ParallelLayout(8, 1, 3), slow)
    assert waits - exposed == pytest.approx(8 * 32 * 7.2e-3 * (1 + 2 * 0.46))
    larger = cost.step_time(LLAMA, ParallelLayout(8), Workload(4096, 8, 4), gpu, 0.6)
    assert larger.launches == 0 and larger.total < few.total


def test_fp8():
    """Products faster, head and attention as before; inputs of products of 1 byte; 2 copies."""
    gpu, work, layout = cost.GPUS["h100"], CREAM, ParallelLayout(1, 1, 1, 8)
    plain, fp8 = (
        cost.kernel_seconds(LLAMA, layout, work, gpu, 0.6, Tuning(fp8=on)) for on in (False, True)
    )
    products = 32 * 6 * memory.layer_matrices(LLAMA) * 4096 / (0.6 * 989.4e12)
    # In and out of the four products, 4 bytes each.
    scales = 4 * (4096 * 3 + 11008 + 4096 * 5 + 2 * 11008) * 32 * 4096 / (0.85 * 3350e9)
    assert plain - fp8 == pytest.approx(products * (1 - 1 / 1.63) - scales)
    assert memory.layer_activations(LLAMA, 1, fp8=True) - memory.layer_activations(LLAMA) == (
        4096 - 2 * 4096 - 11008
    )
    weights = [memory.peak_memory(LLAMA, layout, work, Tuning(fp8=on)).weights for on in (0, 1)]
    assert weights[1] - weights[0] == 2 * 32 * memory.layer_matrices(LLAMA), "tables stay bf16"


def test_packed_documents_do_not_attend_to_each_other():
    gpu, layout = cost.GPUS["h100"], ParallelLayout(1, 1, 1, 8)
    whole, packed = (
        cost.kernel_seconds(LLAMA, layout, Workload(4096, 32, document=n), gpu, 0.6)
        for n in (None, 256)
    )
    attention = 32 * 6 * (4096 - 256) * 4096 * 4096 / (0.5 * 989.4e12)
    assert whole - packed == pytest.approx(attention)


def test_communication():
    gpu = cost.GPUS["h100"]
    one = ParallelLayout(1, 1, 1, 1)
    assert cost.exposed_seconds(LLAMA, one, CREAM, gpu) == 0
    assert cost.replica_seconds(LLAMA, one, gpu) == 0
    # 6 of 10 times 32 MiB of which half is sent, at 0.7 of 450 GB/s.
    sent = 6 * (2 * 4096 * 4096) / 2
    exposed = cost.exposed_seconds(LLAMA, ParallelLayout(2, 1, 1, 1), CREAM, gpu)
    assert exposed == pytest.approx(32 * sent / 315e9)
    inside = cost.replica_seconds(LLAMA, ParallelLayout(1, 1, 1, 8), gpu)
    across = cost.replica_seconds(LLAMA, ParallelLayout(1, 1, 1, 16), gpu)
    assert across / inside == pytest.approx((15 / 16) / (7 / 8))  # the node's links bound both


def test_products_hide_what_tensor_parallelism_sends():
    """All but one piece of as many as ranks, and of 1024 tokens at the least."""
    gpu, on = cost.GPUS["h100"], Tuning(tp_overlap=True)
    for tensor, tokens, pieces in ((2, 4096, 2), (4, 4096, 4), (8, 4096, 4), (8, 512, 1)):
        layout, work = ParallelLayout(tensor), Workload(tokens, 1)
        sent = 10 / pieces * 2 * tokens * 8192 * (tensor - 1) / tensor
        exposed = cost.exposed_seconds(LLAMA_70B, layout, work, gpu, tuning=on)
        assert exposed == pytest.approx(80 * sent / 315e9)


def test_half_of_what_replicas_send_is_exposed_and_all_that_is_longer():
    gpu, layout = cost.GPUS["h100"], ParallelLayout(1, 1, 1, 8)
    sent = cost.replica_seconds(LLAMA, layout, gpu)
    assert cost.step_time(LLAMA, layout, CREAM, gpu, 0.6).communication == sent / 2
    short = Workload(128, 8)
    step = cost.step_time(LLAMA, layout, short, gpu, 0.6)
    busy = step.kernels + step.launches
    assert step.communication == pytest.approx(max(sent / 2, sent - busy))


def test_7b_on_eight_nodes_takes_no_tensor_parallelism_of_a_whole_node():
    """With one card a group the planner took TP8 PP2 here."""
    full = propose.Cluster(64, cost.GPUS["h100"], 74.0, cost.product_share())
    layout = propose.propose(LLAMA, full, CREAM).layout
    assert layout.tensor <= 2 and layout.data >= 16


def test_larger_micro_batches_are_tried_where_asked_for():
    full = propose.Cluster(8, cost.GPUS["h100"], 74.0, 0.6)
    one = propose.propose(LLAMA, full, Workload(512, 64))
    many = propose.propose(LLAMA, full, Workload(512, 64), micro_batches=(1, 2, 4, 8))
    assert one.work.micro_batch == 1 < many.work.micro_batch
    assert many.step.total < one.step.total


def cluster(gpus, gib=74.0):
    return propose.Cluster(gpus, cost.GPUS["h100"], gib, 0.5)


def test_the_proposal_fits_and_none_that_fits_is_faster():
    plan = propose.propose(LLAMA_70B, cluster(64), CREAM)
    assert plan.memory.total <= 74 * 2**30
    for layout in layouts(LLAMA_70B, 64, CREAM):
        step = cost.step_time(LLAMA_70B, layout, CREAM, cost.GPUS["h100"], 0.5)
        fits = memory.peak_memory(LLAMA_70B, layout, CREAM).total <= 74 * 2**30
        assert not fits or step.total >= plan.step.total


def test_one_gpu_does_not_split_a_small_model():
    plan = propose.propose(SMOL, cluster(1), CREAM, micro_batches=(1, 2, 4, 8))
    assert plan.layout == ParallelLayout(1, 1, 1, 1) and plan.work.micro_batch == 8
    assert 0.2 < plan.mfu(SMOL, cluster(1)) < 0.5
    assert propose.propose(SMOL, cluster(1), CREAM).step.launches > 0, "a sample is too little"


def test_what_does_not_fit_says_what_would():
    with pytest.raises(ValueError) as error:
        propose.propose(LLAMA_70B, cluster(8), CREAM)
    for part in ("llama-2-70b", "4096 tokens", "--gpus 8", "--gpu-memory", "16 such GPUs"):
        assert part in str(error.value)
    propose.propose(LLAMA_70B, cluster(16), CREAM)
    with pytest.raises(ValueError, match="no number of such GPUs would do"):
        propose.propose(LLAMA_70B, cluster(8, gib=0.5), CREAM)


def test_what_does_not_divide_says_why():
    with pytest.raises(ValueError) as error:
        propose.propose(LLAMA, cluster(7), Workload(4096, 32), {"tensor": 7})
    for part in ("--gpus is 7", "tensor parallel size 7", "32 heads", "--global-batch-size 32"):
        assert part in str(error.value)


def test_replicas_are_data_and_context_parallel_ranks():
    """Gradients in fp32 go out and weights in bf16 come in, over DP x CP ranks."""
    gpu = cost.GPUS["h100"]
    held = memory.stage_parameters(LLAMA, ParallelLayout(1, 1, 1, 1), 0)
    for layout in (
        ParallelLayout(1, 1, 1, 4),
        ParallelLayout(1, 1, 4, 1),
        ParallelLayout(1, 1, 2, 2),
    ):
        sent = 6 * held * 3 / 4
        assert cost.replica_seconds(LLAMA, layout, gpu) == pytest.approx(sent / 315e9)
    far = cost.replica_seconds(LLAMA, ParallelLayout(1, 1, 4, 4), gpu)
    # Through the 8 cards of a node there are 320 GB/s, but its links have 315.
    assert far == pytest.approx(6 * held * 15 / 16 / 315e9)
    split = cost.replica_seconds(LLAMA, ParallelLayout(2, 1, 1, 32), gpu)
    held = memory.stage_parameters(LLAMA, ParallelLayout(2, 1, 1, 32), 0)
    assert split == pytest.approx(6 * held * 31 / 32 / 160e9)  # 4 of a node's 8 are members
    alone = cost.replica_seconds(LLAMA, ParallelLayout(8, 1, 1, 2), gpu)
    held = memory.stage_parameters(LLAMA, ParallelLayout(8, 1, 1, 2), 0)
    assert alone == pytest.approx(6 * held / 2 / 40e9)
    assert cost.replica_seconds(LLAMA, ParallelLayout(1, 1, 1, 1), gpu) == 0


def test_communication_of_rings_and_stages():
    """Each against its bytes written out; ranks are numbered tensor parallel first."""
    gpu = cost.GPUS["h100"]

    def seconds(layout, work=CREAM, **changes):
        shape = dataclasses.replace(LLAMA_70B, **changes)
        return cost.exposed_seconds(shape, layout, work, gpu)

    hidden = 2 * 4096 * 8192
    once = hidden / 2 / 315e9
    assert seconds(ParallelLayout(2, 1, 1, 1)) == pytest.approx(80 * 6 * once)
    again = ParallelLayout(2, 1, 1, 1, recompute=True)
    assert seconds(again) == pytest.approx(80 * 10 * once)
    quarter = dataclasses.replace(again, recompute_layers=20)
    assert seconds(quarter) == pytest.approx(80 * 7 * once)
    # Keys and values of 64 groups go round a ring of 4: forward, backward, and their gradients.
    # Attention to 4096 tokens hides those of 8 groups; to documents of 64 it hides little.
    assert seconds(ParallelLayout(1, 1, 4, 1)) == 0
    packed = Workload(4096, 32, document=64)
    attention = 6 * 64 * 8192 * 1024 / (0.5 * 989.4e12)
    ring = 3 * (4 * 1024 * 64 * 128) * 3
    inside = seconds(ParallelLayout(1, 1, 4, 1), packed, groups=64)
    assert inside == pytest.approx(80 * (ring / 315e9 - attention))
    # A ring of 4 groups of 8 ranks leaves the node, and each rank sends an eighth.
    tensor = 6 * (hidden / 4) * 7 / 8 / 315e9
    across = seconds(ParallelLayout(8, 1, 4, 1), packed, groups=64)
    assert across == pytest.approx(80 * (tensor + ring / 8 / 40e9 - attention / 8))
    # A stage hands its activations on, and gradients back.
    assert seconds(ParallelLayout(1, 2, 1, 1)) == pytest.approx(2 * hidden / 315e9)


def test_weights_and_gradients_pass_through_memory_once_a_micro_batch():
    gpu, layout = cost.GPUS["h100"], ParallelLayout(1, 1, 1, 1)
    held = memory.stage_parameters(LLAMA, layout, 0)
    rate, apart = 0.85 * 3350e9, Tuning(fused_gradients=False)
    for samples in (1, 8):
        work = Workload(4096, samples)
        step = cost.step_time(LLAMA, layout, work, gpu, 0.5, tuning=apart)
        assert step.update == pytest.approx(held * (10 * samples + 4 + 30) / rate)
        fused = cost.step_time(LLAMA, layout, work, gpu, 0.5)
        assert fused.update == pytest.approx(held * (4 + 30) / rate)
    split, work = ParallelLayout(1, 1, 2, 2), Workload(8192, 2)
    shared = cost.step_time(LLAMA, split, work, gpu, 0.5, tuning=apart)
    assert shared.update == pytest.approx(held * (10 + 4 + 30 / 4) / rate)


def test_the_output_layer_is_work_of_the_last_stage():
    short = dataclasses.replace(LLAMA, layers=4)
    gpu, work = cost.GPUS["h100"], Workload(4096, 2)
    even = cost.step_time(short, ParallelLayout(1, 2, 1, 1), work, gpu, 0.5).kernels
    fewer = cost.step_time(short, ParallelLayout(1, 2, 1, 1, 3, 1), work, gpu, 0.5).kernels
    memory_rate, rate = 0.85 * 3350e9, gpu.tflops * 1e12 * 0.5
    layer = cost.layer_flops(short, 4096) / rate + cost.layer_traffic(short) / memory_rate
    head = 6 * short.vocabulary * short.hidden / rate + 30 * short.vocabulary / memory_rate
    assert even == pytest.approx(2 * 4096 * (2 * layer + head))
    assert fewer == pytest.approx(2 * 4096 * max(3 * layer, layer + head))


def test_parts_of_the_memory_of_a_stage():
    qk = dataclasses.replace(LLAMA, qk_norm=True)
    assert memory.layer_norms(qk) - memory.layer_norms(LLAMA) == 2 * 128
    one, again = ParallelLayout(1, 1, 1, 1), ParallelLayout(1, 1, 1, 1, recompute=True)
    whole = memory.layer_activations(LLAMA)
    small = dataclasses.replace(LLAMA, vocabulary=128)
    kept, made = (memory.stage_memory(small, x, CREAM, 0).working for x in (one, again))
    assert (kept, made) == (4096 * whole, 2 * 4096 * whole)
    head = memory.stage_memory(dataclasses.replace(LLAMA, vocabulary=320000), one, CREAM, 0)
    assert head.working == 4096 * (4 * 4096 + 6 * 320000)


def test_context_parallel_ranks_have_two_pieces_of_a_sample_each():
    """Megatron cuts a sample into 2 x CP pieces: 12 K tokens over 3 ranks, not over an odd rest."""
    work = Workload(3 * 4096 + 3, 1)
    assert all(p.context == 1 for p in layouts(LLAMA, 3, work))
    assert any(p.context == 3 for p in layouts(LLAMA, 3, Workload(6 * 4096, 1)))


def test_ties_go_to_the_layout_that_splits_less(monkeypatch):
    same = cost.StepTime(1.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(propose, "step_time", lambda *_: same)
    found = propose.propose(SMOL, cluster(6), Workload(4096, 6)).layout
    assert (found.tensor, found.pipeline) == (1, 1)
    order = propose.layouts
    monkeypatch.setattr(propose, "layouts", lambda *a, **k: reversed(list(order(*a, **k))))
    found = propose.propose(SMOL, cluster(6), Workload(4096, 6)).layout
    assert (found.tensor, found.pipeline) == (1, 1)


MIXTRAL = MODELS["mixtral-8x7b"]


def test_a_token_meets_two_of_eight_experts():
    """12.9 B of 46.7 B parameters, as its authors count them; attention aside."""
    active = cost.model_flops(MIXTRAL, 0) / 6 + MIXTRAL.vocabulary * MIXTRAL.hidden  # the table
    assert active == pytest.approx(12.9e9, rel=0.005)
    assert MIXTRAL.parameters == pytest.approx(46.7e9, rel=0.001)
    one = dataclasses.replace(MIXTRAL, experts=1, experts_per_token=1)
    dense = dataclasses.replace(MIXTRAL, experts=None, experts_per_token=None)
    routers = 6 * 32 * 4096
    assert cost.model_flops(one, 4096) == cost.model_flops(dense, 4096) + routers


@pytest.mark.parametrize("expert", [1, 2, 4, 8])
def test_experts_are_held_once_by_the_ranks_that_share_them(expert):
    """Whatever the spread, the ranks of a stage hold each parameter as often as they are copies."""
    layout = ParallelLayout(2, 2, 1, 4, expert=expert)
    stage = memory.stage_memory(MIXTRAL, layout, CREAM, 0)
    dense = memory.dense_parameters(MIXTRAL, layout, 0)
    experts = memory.expert_parameters(MIXTRAL, layout, 0)
    assert experts * expert == 16 * 8 * 3 * 4096 * 14336
    assert stage.gradients == 4 * (dense + experts)
    # The optimizer of all experts of a stage, over its eight ranks, is there once.
    assert stage.optimizer == 12 * (dense / 4 + 16 * 8 * 3 * 4096 * 14336 / 8)


def test_only_tokens_whose_expert_is_elsewhere_are_sent():
    """Four passes of two copies of a token in bf16, by the formula and the node's links alone."""
    gpu, work = cost.GPUS["h100"], Workload(4096, 64)
    apart = [
        cost.exposed_seconds(MIXTRAL, ParallelLayout(1, 1, 1, 64, expert=size), work, gpu)
        for size in (1, 2, 8)
    ]
    sent = 32 * 4 * 2 * 2 * 4096 * 4096 / gpu.node_rate
    assert apart == pytest.approx([0, sent / 2, sent * 7 / 8])
    across = ParallelLayout(1, 1, 1, 64, expert=8)
    slow = cost.exposed_seconds(MIXTRAL, across, work, gpu, node=4)
    assert slow == pytest.approx(apart[2] * gpu.node_rate / gpu.network_rate)


def test_experts_stay_in_a_node_and_are_divided_evenly():
    found = list(layouts(MIXTRAL, 32, CREAM, 4))
    assert {layout.expert for layout in found} == {1, 2, 4}
    assert all(layout.gpus // layout.pipeline % layout.expert == 0 for layout in found)
    fixed = layouts(MIXTRAL, 32, CREAM, 8, {"expert": 8, "tensor": 1})
    assert {(layout.expert, layout.tensor) for layout in fixed} == {(8, 1)}
    assert all(layout.expert == 1 for layout in layouts(LLAMA, 8, CREAM))


def test_dual_chunk_attention_takes_what_was_measured():
    for tokens, factor in cost.DUAL_CHUNK.items():
        assert cost.dual_chunk_factor(tokens) == pytest.approx(factor)
    lengths = [2**n for n in range(12, 20)]
    factors = [cost.dual_chunk_factor(tokens) for tokens in lengths]
    assert factors == sorted(factors, reverse=True) and factors[-1] == cost.DUAL_CHUNK[131072]
    # Below what was measured, what it takes more is linear: the quadratic part is plain attention.
    more = [(f - 1) * tokens for f, tokens in zip(factors, lengths, strict=True) if tokens <= 32768]
    assert more == pytest.approx([more[0]] * len(more))


def test_dual_chunk_is_planned_with_its_own_time_and_gathers_before_it():
    layout, work, gpu = ParallelLayout(context=2), Workload(65536, 8), cost.GPUS["h200"]
    plain, chunks = Tuning(), Tuning(dual_chunk=True)
    kernels = [cost.kernel_seconds(LLAMA, layout, work, gpu, 0.6, t) for t in (plain, chunks)]
    attention = 6.0 * 65536 * LLAMA.heads * LLAMA.head_dim * LLAMA.layers * 65536 / 2
    attention /= gpu.tflops * 1e12 * cost.ATTENTION_SHARE
    assert kernels[1] - kernels[0] == pytest.approx(0.059 * attention)
    sent = [cost.exposed_seconds(LLAMA, layout, work, gpu, 8, t) for t in (plain, chunks)]
    assert sent[0] == 0 < sent[1]
