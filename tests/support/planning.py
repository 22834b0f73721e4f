# SPDX-License-Identifier: Apache-2.0
"""What tests of planning call in processes of their own."""

from megatron_cream.mcore import fake_world
from megatron_cream.planning.stages import check_stages


def views(argv, world_size):
    """Return what the check sees: its arguments do not travel between processes."""
    from megatron_cream.planning.stages import stage_lines

    check = check_stages(argv, world_size)
    return check.views, check.parameters, stage_lines(check)


def with_stock_rotary(argv, world_size):
    """Check stages where our rotary is not put in."""
    from megatron_cream.mcore import hooks

    hooks.model_config = lambda args, extension: hooks.megatron_config(args)
    return views(argv, world_size)


def with_layers_left_out(argv, world_size):
    """Check stages where every rank forgets its last layer."""
    build = fake_world.build

    def short(args, extension, groups):
        chunks = build(args, extension, groups)
        for chunk in chunks if args.world_size > 1 else []:
            del chunk.decoder.layers[-1]
        return chunks

    fake_world.build = short
    return views(argv, world_size)


def megatrons_estimate(argv, world_size):
    """Return what Megatron estimates for weights and optimizer, in bytes."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    fake_world.prepare()
    args, _ = fake_world.parse(argv, world_size)
    return compute_weight_and_optimizer_memory(args)


def inside_a_process_group(argv, world_size):
    """Check stages in a process that has started to train."""
    import torch

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    return views(argv, world_size)


def dry_run_lines(argv, world_size):
    """What a dry run prints."""
    from megatron_cream.dry_run import dry_run, lines

    return lines(dry_run(argv, world_size))


def dry_run_with_layers_left_out(argv, world_size):
    """A dry run where every rank forgets its last layer."""
    build = fake_world.build

    def short(args, extension, groups):
        chunks = build(args, extension, groups)
        for chunk in chunks:
            del chunk.decoder.layers[-1]
        return chunks

    fake_world.build = short
    return dry_run_lines(argv, world_size)


def loss_kernel(argv, world_size):
    """Return which cross entropy the model's config asks for."""
    from megatron_cream.mcore import hooks

    fake_world.prepare()
    config = hooks.model_config(*fake_world.parse(argv, world_size)).transformer
    return config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl
