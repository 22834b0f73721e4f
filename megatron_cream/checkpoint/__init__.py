# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: converted from and to Hugging Face, examined, and loaded.

import_hf         Hugging Face to Megatron
export_hf         Megatron to Hugging Face
weight_map        which Hugging Face tensors a Megatron tensor is made of, per family
model_shape       what a model is: as config.json, as Megatron's flags and its arguments
hf_files          the files of a Hugging Face folder beside its weights
hf_weights        its safetensors files
model_card        README.md of an export, and which inference engines read it
torch_dist_io     tensors of a Megatron checkpoint, read and written
torch_dist_table  where they are, and the checksums of its files
unpickling        reads its pickles without running them
iterations        the iterations of a run, and the arguments saved with one
loading           a model to evaluate; what a run starts from, validated before it starts
doctor            damage
"""
