# SPDX-License-Identifier: Apache-2.0
"""The one door to Megatron-Core.

patches             the registry of what is replaced in it; with trainer and attention_rotation
hooks               what is put into its model config; with rotary
extra               the interface of parts that a run can do without
argument_table      what each of its arguments may be; with validation
cpu                 the CPU in the place of ``torch.cuda``
build_model         models for evaluation; with pipeline_stage and safe_globals
fake_world          any rank of any world in one process
"""
