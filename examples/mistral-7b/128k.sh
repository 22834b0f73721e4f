#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Mistral-7B-v0.3 to 128K on 8 H100, trained at 4096 tokens.
#
# megatron-cream plan mistral-7b --gpus 8 --target-length 131072
#   TP1 PP1 DP8: 68.5 GiB per GPU, 1.43 s per step, 1000 steps in 23.8 min
#
#   DATA=data/books examples/mistral-7b/128k.sh
set -euo pipefail

NAME=mistral-7b
HF=${HF:-mistralai/Mistral-7B-v0.3}
TARGET_LENGTH=131072
ORIGINAL_LENGTH=32768
VOCAB_SIZE=32768
PLANNED_RETAIN_INTERVAL=1000
CHECKPOINT_GB=${CHECKPOINT_GB:-101}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
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
