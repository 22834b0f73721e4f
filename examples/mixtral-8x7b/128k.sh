#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Mixtral-8x7B-v0.1 to 128K on 32 H100, 4 nodes of 8, trained at 4096 tokens.
#
# megatron-cream plan mixtral-8x7b --gpus 32 --target-length 131072 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
#   TP1 PP4 VP8 EP8 DP8: 57.3 GiB per GPU, 0.74 s per step, 1000 steps in 12.3 min
#
#   DATA=data/books examples/mixtral-8x7b/128k.sh
set -euo pipefail

NAME=mixtral-8x7b
HF=${HF:-mistralai/Mixtral-8x7B-v0.1}
TARGET_LENGTH=131072
ORIGINAL_LENGTH=32768
VOCAB_SIZE=32000
PLANNED_RETAIN_INTERVAL=1000
NODES=${NODES:-4}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
CHECKPOINT_GB=${CHECKPOINT_GB:-654}

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --num-experts 8 --moe-router-topk 2
    --moe-ffn-hidden-size 14336
    --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --position-embedding-type rope --rotary-base 1000000
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 8 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
)

extend "$@"
