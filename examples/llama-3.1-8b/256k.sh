#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-3.1-8B to 256K on 8 H100, trained at 4096 tokens.
#
# megatron-cream plan llama-3.1-8b --gpus 8 --target-length 262144 --grad-reduce-in-bf16
#   TP1 PP1 DP8: 61.1 GiB per GPU, 1.49 s per step, 1000 steps in 24.8 min
#
#   DATA=data/books examples/llama-3.1-8b/256k.sh
set -euo pipefail

NAME=llama-3.1-8b
HF=${HF:-meta-llama/Llama-3.1-8B}
TARGET_LENGTH=262144
ORIGINAL_LENGTH=8192
VOCAB_SIZE=128256
PLANNED_RETAIN_INTERVAL=1000
ROPE=${ROPE:-llama3}
CHECKPOINT_GB=${CHECKPOINT_GB:-112}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 500000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --use-distributed-optimizer
    --overlap-grad-reduce --overlap-param-gather --grad-reduce-in-bf16
)

extend "$@"
