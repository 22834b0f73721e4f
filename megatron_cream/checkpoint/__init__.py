# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: which one is there, what was saved with it, and a model out of it.

saved    what a torch_dist checkpoint says about itself (no GPU, no process group)
loading  a model ready to evaluate
"""
