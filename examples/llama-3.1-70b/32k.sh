#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-3.1-70B to 32K on 64 H100, 8 nodes of 8, trained at 4096 tokens.
# Llama 3.1 reaches 131072 tokens as released, and keeps its RoPE here: the run trains
# distances on your own text, at the cost of samples of 4096 tokens.
#
# megatron-cream plan llama-3.1-70b --gpus 64 --target-length 32768 --inside-window
#   TP4 PP4 VP10 DP4: 60.9 GiB per GPU, 2.00 s per step, 1000 steps in 33.4 min
#
#   DATA=data/books examples/llama-3.1-70b/32k.sh
set -euo pipefail

NAME=llama-3.1-70b
HF=${HF:-meta-llama/Llama-3.1-70B}
TARGET_LENGTH=32768
ORIGINAL_LENGTH=8192
VOCAB_SIZE=128256
ROPE=${ROPE:-llama3}
NODES=${NODES:-8}
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 500000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 10 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather
)

extend "$@"
