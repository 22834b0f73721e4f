#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-7B-chat to 32K on 8 H100, trained at 4096 tokens.
# CREAM's published recipe for a chat model: 100 steps of 32 conversations of 4096 tokens
# or more, 2e-5 without warm-up. Conversations become text by megatron-cream render-chat;
# every token is trained, the user's too.
#
# megatron-cream plan llama-2-7b --gpus 8 --target-length 32768 --train-iters 100
#   TP1 PP1 DP8: 63.9 GiB per GPU, 1.34 s per step, 100 steps in 2.2 min
#
#   DATA=data/conversations examples/llama-2-7b/chat-32k.sh
set -euo pipefail

NAME=llama-2-7b-chat
HF=${HF:-meta-llama/Llama-2-7b-chat-hf}
TARGET_LENGTH=32768
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
ITERATIONS=${ITERATIONS:-100}
WARMUP=${WARMUP:-0}
CHECKPOINT_GB=${CHECKPOINT_GB:-94}
RETRIEVAL_SHARE=${RETRIEVAL_SHARE:-0}

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
