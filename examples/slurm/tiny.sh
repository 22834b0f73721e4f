#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What check.sh trains: a random Llama of 0.1 M parameters on this repository's docs, by gloo on CPUs.
# It is a launch script like the others, made small.
set -euo pipefail

NAME=tiny
WORK=${WORK:-runs/tiny}
HF=$WORK/hf
DATA=$WORK/text
BASE=$WORK/base
OUT=$WORK/run
EXPORT=$WORK/extended
SEQ_LENGTH=${SEQ_LENGTH:-64}
TARGET_LENGTH=$((4 * SEQ_LENGTH))
ORIGINAL_LENGTH=$SEQ_LENGTH
RETRIEVAL_SHARE=${RETRIEVAL_SHARE:-0} # documents have 256 tokens at least
VOCAB_SIZE=512
GLOBAL_BATCH=4
ITERATIONS=${ITERATIONS:-100}
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes, here
ASYNC_SAVE=0
EVAL_ITERS=0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL_ARGS=(--use-checkpoint-args --attention-dropout 0 --hidden-dropout 0)
PARALLEL_ARGS=()
TRAINING_ARGS=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERATIONS"
    --lr 1e-3 --min-lr 0 --lr-decay-style linear --lr-warmup-iters "$WARMUP" --weight-decay 0
)
GPU_ARGS=(--cpu --num-workers 0)

if [ "$NODE_RANK" = 0 ] && [[ $STEPS == *import* ]]; then
    [ -e "$HF/model.safetensors" ] || "$PYTHON" "$HERE/examples/quickstart/tiny_model.py" \
        --text "$HERE/docs" --output "$HF"
    [ -e "$DATA.idx" ] || "$PYTHON" "$HERE/tools/preprocess_data.py" --input "$HERE/docs" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF" --output-prefix "$DATA"
fi
extend "$@"
