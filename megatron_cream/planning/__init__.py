# SPDX-License-Identifier: Apache-2.0
"""Plans a run before there is a cluster: layout, memory, time, command, and a check of it.

plan      the command ``megatron-cream plan``
models    shapes of models, by name or config.json, Megatron's flags for them, bytes per GPU
cost      operations, communication and seconds per step
propose   the layouts that divide a model and a batch, and the fastest that fits
script    flags by theme, environment, and the bash that starts a run
report    table and JSON; plans beside published tokens per second per GPU
stages    a layout built rank by rank, checked, and what its stages hold; what a run will take
preflight the command that finds the slow node of a job
"""
