#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-13B to 32K on 8 H100, trained at 4096 tokens.
#
# megatron-cream plan llama-2-13b --gpus 8 --target-length 32768 --tensor-model-parallel-size 1
#   TP1 PP4 VP10 DP2: 65.0 GiB per GPU, 2.58 s per step, 1000 steps in 43.0 min
#
#   DATA=data/books examples/llama-2-13b/32k.sh
set -euo pipefail

NAME=llama-2-13b
HF=${HF:-meta-llama/Llama-2-13b-hf}
TARGET_LENGTH=32768
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
PLANNED_RETAIN_INTERVAL=1000
CHECKPOINT_GB=${CHECKPOINT_GB:-182}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --num-attention-heads 40
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 10000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 10 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather
)

extend "$@"
