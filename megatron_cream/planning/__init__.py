# SPDX-License-Identifier: Apache-2.0
"""What a run needs before there is a cluster: layout, memory, time, command, and a check of it.

models      shapes of models, by name or config.json, and Megatron's flags for them
layouts     parallel sizes that divide a model and a batch
memory      bytes on a GPU of each pipeline stage
cost        operations, communication and seconds of a step
propose     the fastest layout that fits
command     flags by theme and the script that starts a run
report      table, JSON, stage lines
arguments   shape and layout that parsed arguments describe
fake_world  any rank of any world in one process             (needs torch, megatron)
stages      ``check_stages``: a layout built rank by rank    (needs torch, megatron)
dry_run     a run's exact command, looked at          (needs torch, megatron)
"""
