# SPDX-License-Identifier: Apache-2.0
"""From text to batches.

text, compression, reading, records, giant, columnar  files to documents, or what is wrong
tokenizers, tokenizer_types, tokenizer_files, bpe     documents to ids: by the reference libraries
fast, verify, cuts, engine                            the same, fast where it is exact
checks, plan, units, parts, folder, workers, on_ray   a job, cut into parts that outlive a kill
finish, assemble, publish, note, preprocess           parts to Megatron's indexed dataset
merge, inspection, index, documents                   datasets, read and checked without megatron
sources                                         which stretches of text samples are drawn from
span_dataset, span_reader                       samples that read only their spans
batch                                           what a pipeline stage hands its model
"""
