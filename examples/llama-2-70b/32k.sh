#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-70B to 32K on 32 H100, 4 nodes of 8, trained at 4096 tokens.
#
# megatron-cream plan llama-2-70b --gpus 32 --target-length 32768 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 5 --tp-comm-overlap
#   TP4 PP4 VP5 DP2: 72.9 GiB per GPU, 3.39 s per step, 1000 steps in 56.6 min
#
#   DATA=data/books examples/llama-2-70b/32k.sh
set -euo pipefail

NAME=llama-2-70b
HF=${HF:-meta-llama/Llama-2-70b-hf}
TARGET_LENGTH=32768
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
PLANNED_RETAIN_INTERVAL=1000
NODES=${NODES:-4}
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
CHECKPOINT_GB=${CHECKPOINT_GB:-966}

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
    --tensor-model-parallel-size 4 --sequence-parallel --tp-comm-overlap
    --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 5
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)

# With FP8=1 its copies of the weights leave no room for gradients in fp32.
FP8_ARGS+=(--grad-reduce-in-bf16)

extend "$@"
