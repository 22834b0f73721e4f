# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: converted from and to Hugging Face, examined, and loaded.

import_hf         Hugging Face to Megatron
export_hf         Megatron to Hugging Face
weight_map        which Hugging Face tensors a Megatron tensor is made of, per family
model_shape       what a model is: as config.json, as Megatron's flags and its arguments
hf_folder         a Hugging Face folder, read: weights, and the files beside them
hf_writer         safetensors files and the model card of an export, and which engines read it
torch_dist_io     tensors of a Megatron checkpoint, read and written
torch_dist_table  where they are; its pickles, read without running them
iterations        the iterations of a run, the arguments and checksums saved with one
loading           a model to evaluate; what a run starts from, validated before it starts
doctor            damage
"""
