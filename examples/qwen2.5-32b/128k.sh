#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Qwen2.5-32B to 128K on 8 H100, trained at 4096 tokens.
#
# megatron-cream plan qwen2.5-32b --gpus 8 --target-length 131072 --use-precision-aware-optimizer
#   TP4 PP2 VP16 DP1: 60.6 GiB per GPU, 6.58 s per step, 1000 steps in 109.6 min
#
#   DATA=data/books examples/qwen2.5-32b/128k.sh
set -euo pipefail

NAME=qwen2.5-32b
HF=${HF:-Qwen/Qwen2.5-32B}
TARGET_LENGTH=131072
ORIGINAL_LENGTH=32768
VOCAB_SIZE=152064
PLANNED_RETAIN_INTERVAL=1000
CHECKPOINT_GB=${CHECKPOINT_GB:-459}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 64 --hidden-size 5120 --ffn-hidden-size 27648 --num-attention-heads 40
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear --add-qkv-bias
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 1000000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2
    --num-virtual-stages-per-pipeline-rank 16 --use-distributed-optimizer
    --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16
)

extend "$@"
