# SPDX-License-Identifier: Apache-2.0
"""Megatron's own trainer with our positions, angles and data.

entry       what every way to start a run shares
arguments   our flags, and what they are checked for before a GPU is asked for
checks      files, datasets and checkpoints, likewise
hooks       what is put into Megatron's model config
cross_entropy  Transformer Engine's kernel for it, which Megatron's own flag does not give
hybrid      which HybridModel patterns can be trained, and their layers on a CPU
data        datasets for every pipeline stage
step        forward step and loss
restart     --inprocess-restart, of the whole start of a run
report      the block printed at start
scalars     ours in TensorBoard and Weights & Biases
cpu         Megatron's trainer on a machine with no GPU
megatron    patches where its own processes stand in the way
"""
