# SPDX-License-Identifier: Apache-2.0
"""Makes datasets: text to a Megatron indexed dataset. Nothing here imports megatron.

preprocess                   the whole of it, from top to bottom; begin to read here
job                          what is asked for, checked and cut into units of work
input_files                  inputs found, opened, expanded
readers, records             spans of files to records, records to texts, long ones in pieces
tokenizers, gigatoken        texts to ids: by the reference libraries, or faster
encode, executors            a unit to parts on disk that outlive a kill; units to processes
assemble                     parts to the files of a dataset
work_folder                  a folder for the parts; files moved into place
merge, inspection, chat      datasets merged, described and checked, made of conversations
retrieval                    documents that ask for what stood in them, made of the tasks and
                             words of ``retrieval_tasks`` and ``retrieval_words``
"""
