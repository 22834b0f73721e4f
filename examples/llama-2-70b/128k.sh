#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-70B to 128K on 64 H100, 8 nodes of 8, trained at 4096 tokens.
#
# megatron-cream plan llama-2-70b --gpus 64 --target-length 131072
#   TP4 PP8 VP10 DP2: 47.7 GiB per GPU, 1.88 s per step, 1000 steps in 31.3 min
#
#   DATA=data/books examples/llama-2-70b/128k.sh
set -euo pipefail

NAME=llama-2-70b
HF=${HF:-meta-llama/Llama-2-70b-hf}
TARGET_LENGTH=131072
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
NODES=${NODES:-8}
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 10000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 8
    --num-virtual-stages-per-pipeline-rank 10 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather
)

extend "$@"
