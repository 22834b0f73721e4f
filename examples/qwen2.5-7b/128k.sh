#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Qwen2.5-7B to 128K on 8 H100, trained at 4096 tokens.
#
# megatron-cream plan qwen2.5-7b --gpus 8 --target-length 131072
#   TP1 PP1 DP8: 73.7 GiB per GPU, 1.42 s per step, 1000 steps in 23.7 min
#
#   DATA=data/books examples/qwen2.5-7b/128k.sh
set -euo pipefail

NAME=qwen2.5-7b
HF=${HF:-Qwen/Qwen2.5-7B}
TARGET_LENGTH=131072
ORIGINAL_LENGTH=32768
VOCAB_SIZE=152064
PLANNED_RETAIN_INTERVAL=1000
CHECKPOINT_GB=${CHECKPOINT_GB:-107}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28
    --group-query-attention --num-query-groups 4
    --swiglu --normalization RMSNorm --norm-epsilon 1e-06 --disable-bias-linear --add-qkv-bias
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 1000000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --use-distributed-optimizer
    --overlap-grad-reduce --overlap-param-gather
)

# With FP8=1 its copies of the weights leave no room for gradients in fp32.
FP8_ARGS+=(--grad-reduce-in-bf16)

extend "$@"
