# SPDX-License-Identifier: Apache-2.0
"""Training with Megatron's own trainer, by our positions, angles and data; ``pretrain`` starts it.

arguments    our flags, and the settings they make
validate     every check of a run, in order; with resume, what it starts from
datasets     the blend that flags name, and the datasets of a pipeline stage
step         a micro-batch: batch, model, loss
start_block  what is printed at start
progress     what a run tells while it goes on: scalars, planned and measured step
"""
