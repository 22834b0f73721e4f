# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what was saved, a model out of it, and Hugging Face's in and out.

saved         what a torch_dist checkpoint says about itself (no GPU, no process group)
loading       a model ready to evaluate
importing     Hugging Face to Megatron: families, weights, agreement, arguments, torch_dist
exporting     Megatron to Hugging Face: stored, extraction, shards, card
shape         what a model is; config_json and flags: in Hugging Face's terms and in Megatron's
source        the files of a Hugging Face folder beside its weights
staging       folders that are whole or not there
"""
