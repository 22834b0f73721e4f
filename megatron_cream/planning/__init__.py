# SPDX-License-Identifier: Apache-2.0
"""Plans a run before there is a cluster: layout, memory, time, command, and a check of it.

plan      the command ``megatron-cream plan``
models    shapes of models, by name or config.json, and Megatron's flags for them
memory    bytes per GPU of each pipeline stage
cost      operations, communication and seconds per step
published plans beside published tokens per second per GPU
propose   the layouts that divide a model and a batch, and the fastest that fits
script    flags by theme, and the bash that starts a run
report    table and JSON
stages    a layout built rank by rank, checked, and what its stages hold
"""
