# SPDX-License-Identifier: Apache-2.0
"""From text to batches.

text, tokenizers, preprocess  documents to Megatron's indexed dataset
index                         reads and checks an index without megatron
span_dataset                  samples that read only their spans; blends; middle pipeline stages
batch                         what a pipeline stage hands its model
"""
