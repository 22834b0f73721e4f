# SPDX-License-Identifier: Apache-2.0
"""Megatron's trainer with writers that keep what they are given, TensorBoard or not."""

import json
import sys
import types
from unittest import mock


def train(flags, file):
    """Run ``megatron_cream.pretrain`` on this rank; scalars land in ``file``, one per line."""
    log = open(file, "a", buffering=1)  # noqa: SIM115

    def keep(writer, name, value, step):
        log.write(json.dumps([writer, name, float(value), int(step)]) + "\n")

    class SummaryWriter:
        def __init__(self, **_):
            pass

        def add_scalar(self, name, value, step):
            keep("tensorboard", name, value, step)

        def __getattr__(self, name):  # text, flush, close
            return lambda *_, **__: None

    def log_all(values, step=None):
        for name, value in values.items():
            keep("wandb", name, value, step)

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    wandb = types.ModuleType("wandb")
    wandb.init = wandb.finish = wandb.define_metric = lambda *_, **__: None
    wandb.log = log_all
    wandb.run, wandb.config = None, {}
    sys.modules.update({"torch.utils.tensorboard": board, "wandb": wandb})
    from megatron_cream import pretrain

    sys.argv = ["pretrain", "--cpu", *flags]
    pretrain.main()


def trainers_log(flags, moved):
    """Start a run that ends at once; return whether our scalars are written."""
    from megatron.training import training

    if moved:
        del training.training_log
    from megatron_cream import pretrain
    from megatron_cream.mcore import hooks
    from megatron_cream.mcore.argument_table import cpu_flags

    sys.argv = ["pretrain", "--cpu", *cpu_flags(), *flags]
    args = pretrain.prepare()
    with mock.patch("megatron_cream.training.progress.Scalars") as scalars:
        pretrain.get_ready(args, hooks.megatron_config(args))
    return scalars.called
