# SPDX-License-Identifier: Apache-2.0
"""Makes datasets: text to a Megatron indexed dataset. Nothing here imports megatron.

preprocess                   the whole of it; begin to read here
settings, job                what is asked for, checked; a job, cut into units of work
input_files                  inputs found, opened, expanded
readers, records, columnar   spans of files to records, records to texts
tokenizers, gigatoken        texts to ids: by the reference libraries, or faster
split_points                 where long texts may be cut
encode, executors            a unit to parts on disk that outlive a kill; units to processes
assemble, work_folder        parts to a dataset; a folder for the work, files moved into place
merge, inspection, chat      datasets merged, described and checked, made of conversations
retrieval                    documents that ask for what stood in them
"""
