#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-7B-chat to 16K on 8 H100, trained at 16384 tokens.
# ChunkLlama's published fine-tuning (arXiv:2402.17463): conversations through dual chunk
# attention, 1600 steps of 16, 2e-5, cosine after 3 % of warm-up, no interpolation. Loss is
# on the assistant's words: render-chat --assistant-only, preprocess --mask-key trained.
# Time below 32K tokens is extrapolated, and memory is that of plain attention.
#
# megatron-cream plan llama-2-7b --gpus 8 --target-length 16384 --seq-length 16384 --train-iters 1600 --global-batch-size 16 --dual-chunk
#   TP2 PP1 DP4: 62.0 GiB per GPU, 3.75 s per step, 1600 steps in 99.9 min
#
#   DATA=data/answers examples/llama-2-7b/chunkllama-16k.sh
set -euo pipefail

NAME=llama-2-7b-chat
HF=${HF:-meta-llama/Llama-2-7b-chat-hf}
TARGET_LENGTH=16384
ORIGINAL_LENGTH=4096
VOCAB_SIZE=32000
PLANNED_RETAIN_INTERVAL=1600
METHOD=${METHOD:-full}
ROPE=${ROPE:-none}
SEQ_LENGTH=${SEQ_LENGTH:-16384}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
ITERATIONS=${ITERATIONS:-1600}
WARMUP=${WARMUP:-48}
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
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)

EXTENSION_ARGS+=(--dual-chunk --sample-unit packed-documents)
TRAINING_ARGS+=(--lr-decay-style cosine)

extend "$@"
