#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-7B to 32K on 8 H100, trained at 4096 tokens.
# RETRIEVAL_SHARE=0 ROPE=linear is CREAM's published recipe: 1000 steps of 32 samples, 2e-5
# after 10 steps.
#
# megatron-cream plan llama-2-7b --gpus 8 --target-length 32768
#   TP1 PP1 DP8: 63.9 GiB per GPU, 1.34 s per step, 1000 steps in 22.3 min
#
#   DATA=data/books examples/llama-2-7b/32k.sh
set -euo pipefail

NAME=llama-2-7b
HF=${HF:-meta-llama/Llama-2-7b-hf}
TARGET_LENGTH=32768
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
CHECKPOINT_GB=${CHECKPOINT_GB:-94}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 10000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --use-distributed-optimizer
    --overlap-grad-reduce --overlap-param-gather
)

# With FP8=1 its copies of the weights leave no room for gradients in fp32.
FP8_ARGS+=(--grad-reduce-in-bf16)

extend "$@"
