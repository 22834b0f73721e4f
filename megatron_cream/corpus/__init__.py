# SPDX-License-Identifier: Apache-2.0
"""Makes datasets: text to a Megatron indexed dataset. Nothing here imports megatron.

preprocess                   the whole of it, from top to bottom; begin to read here
job                          what is asked for, checked and cut into units of work
input_files                  inputs found, cut into spans, opened
optional_formats             zstd, Parquet and Arrow: what needs a library of its own
readers                      spans of files to records and their texts, long ones in pieces
tokenizers, fast_encoder     texts to ids: by the reference libraries, or faster and cut
encode, executors            a unit to parts on disk that outlive a kill; units to processes
storage                      a folder for the parts; parts joined into a dataset, moved into place
merge, inspection, chat      datasets merged, described and checked, made of conversations
retrieval                    documents that ask for what stood in them, made of the tasks and
                             words of ``retrieval_tasks`` and ``retrieval_words``
"""
