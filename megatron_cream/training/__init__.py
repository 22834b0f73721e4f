# SPDX-License-Identifier: Apache-2.0
"""Training with Megatron's own trainer, by our positions, angles and data.

startup      starts a run: machine, flags, checks, hooks and patches
arguments    our flags, and the settings they make
validate     every check of a run, in order; with blend and resume
datasets     builds the datasets of a pipeline stage
step         forward step and loss
start_block  what is printed at start; with tokens_read
scalars      ours in TensorBoard and Weights & Biases
step_report  planned and measured step, after 20 iterations
"""
