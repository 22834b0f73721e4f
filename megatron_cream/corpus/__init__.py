# SPDX-License-Identifier: Apache-2.0
"""Makes datasets: text to a Megatron indexed dataset. Nothing here imports megatron.

preprocess        the whole of it: a job from its settings to the dataset in its place
settings, job     what is asked for, checked; the job and the units that it is cut into
readers, jsonl, columnar, compression    input files to records
tokenizers, gigatoken, engine            records to ids: by the reference libraries, or faster
encode, split_points, storage            a unit to parts on disk that outlive a kill
executors         units on this machine or on a Ray cluster
assemble, statistics, work_folder        parts to a dataset, described, moved into its place
merge, inspection, chat                  datasets merged, read, made of conversations
retrieval         documents that ask for what stood in them
"""
