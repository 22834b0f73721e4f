# SPDX-License-Identifier: Apache-2.0
"""The one door to Megatron-Core.

patches             the registry of what is replaced in it; with trainer
hooks               what is put into its model config, and the interface of ``extras``
rotary              how a model turns queries and keys
argument_table      what each of its arguments may be; with validation
cpu                 the CPU in the place of ``torch.cuda``
build_model         models outside training
fake_world          any rank of any world in one process
"""
