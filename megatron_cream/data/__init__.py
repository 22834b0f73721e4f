# SPDX-License-Identifier: Apache-2.0
"""From text to batches.

text, tokenizers, workers, publish, preprocess  documents to Megatron's indexed dataset
index, documents                                read and check one without megatron
sources                                         which stretches of text samples are drawn from
span_dataset                                    samples that read only their spans
batch                                           what a pipeline stage hands its model
"""
