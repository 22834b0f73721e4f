#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a Hugging Face folder and folders of text to an extended, exported, evaluated model.
#
#   HF=SmolLM2-135M TEXT=books/train HELD_OUT=books/validation examples/quickstart/run.sh
#   examples/quickstart/run.sh --smoke      # a random model, this repository's docs, two CPU cores
#   examples/quickstart/run.sh --dry-run    # what the training command will be, without a GPU
#
# As it stands: SmolLM2-135M from 8192 to 32768 tokens with CREAM and YaRN in 130 steps of 131072
# tokens on one GPU. Every name in capitals can be set from outside. Commands that are done are not
# repeated.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1

MACHINE_ARGS=(
    --bf16 --use-distributed-optimizer --manual-gc --manual-gc-interval 100
    # Compiling takes longer than it saves in so few steps: Transformer Engine's SwiGLU is ready, and
    # --cross-entropy-loss-fusion is left out.
    --disable-jit-fuser --no-bias-swiglu-fusion --use-te-activation-func
)

if [ "${1:-}" = --smoke ]; then
    WORK=${WORK:-runs/smoke} GPUS=2
    HF=$WORK/tiny TEXT=$HERE/docs HELD_OUT=$HERE/README.md DOCUMENTS=1
    WINDOW=64 TARGET=256 LENGTHS="64 128 256"
    STEPS=6 MICRO_BATCH=2 GLOBAL_BATCH=4 LR=1e-3
    RETRIEVAL=0 # 64 tokens are too few for a document with questions
    MACHINE_ARGS=(--cpu --num-workers 0)
    [ -d "$HF" ] || "$PYTHON" "$HERE/examples/quickstart/tiny_model.py" --output "$HF" --text "$TEXT"
fi

# shellcheck source=lengths.sh
source "$HERE/examples/quickstart/lengths.sh"
# shellcheck source=../torchrun.sh
source "$HERE/examples/torchrun.sh"

WORK=${WORK:-runs/quickstart}
BASE=${BASE:-$WORK/base}
DATA=${DATA:-$WORK/text}
# Share of the samples that ask for what stands in them; docs/choosing.md has it measured.
RETRIEVAL=${RETRIEVAL:-0.30}
RETRIEVAL_DATA=${RETRIEVAL_DATA:-$WORK/retrieval}
GPUS=${GPUS:-1}
METHOD=${METHOD:-cream}
ROPE=${ROPE:-yarn}
STEPS=${STEPS:-130}
MICRO_BATCH=${MICRO_BATCH:-8}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
LR=${LR:-4e-4}
MODEL_ARGS=(--use-checkpoint-args)

[ "$GPUS" = 1 ] || [ "${1:-}" = --smoke ] || MACHINE_ARGS+=(--overlap-grad-reduce --overlap-param-gather)

# Prints a command and runs it, unless what it makes is there.
step() {
    if [ -e "$1" ]; then
        echo "$1 is there" >&2
    else
        echo "\$ ${*:2}" >&2
        "${@:2}"
    fi
}

# Transformer Engine adds up gradients in its own kernels only with Apex beside it (NGC has it).
if [ "${1:-}" != --smoke ] && ! "$PYTHON" -c "import fused_weight_gradient_mlp_cuda" 2>/dev/null; then
    echo "Apex is not installed: --no-gradient-accumulation-fusion" >&2
    MACHINE_ARGS+=(--no-gradient-accumulation-fusion)
fi

# Its cross entropy kernel is ready in a second; before 2.19 it was not one to train with.
if [ "${1:-}" != --smoke ] && "$PYTHON" -c "
import sys
from megatron_cream.extras.te_cross_entropy import why_absent
reason = why_absent()
sys.exit(reason and f'without --te-cross-entropy: it needs {reason}')"; then
    MACHINE_ARGS+=(--te-cross-entropy)
fi

[[ $RETRIEVAL =~ ^0?(\.[0-9]+)?$ && -n $RETRIEVAL ]] || {
    echo "error: RETRIEVAL is $RETRIEVAL: it must be a share of the samples, at least 0 and below 1" >&2
    exit 2
}
DATA_PATH=("$DATA")
if [[ $RETRIEVAL == *[1-9]* ]]; then
    DATA_PATH=("$(LC_ALL=C awk "BEGIN { printf \"%g\", 1 - $RETRIEVAL }")" "$DATA" "$RETRIEVAL" "$RETRIEVAL_DATA")
fi

train_args() {
    TRAIN_ARGS=(
        "${MODEL_ARGS[@]}" --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0
        --seq-length "$WINDOW" --max-position-embeddings "$WINDOW"
        --target-length "$TARGET" --original-length "$WINDOW"
        --position-strategy "$METHOD" --rope-interpolation "$ROPE"
        ${PLAIN_SHARE:+--plain-share "$PLAIN_SHARE"}
        --data-path "${DATA_PATH[@]}" --split "100,0,0" --no-create-attention-mask-in-dataloader
        --pretrained-checkpoint "$BASE" --save "$WORK/run" --load "$WORK/run"
        --save-interval "$STEPS" --eval-iters 0 --eval-interval "$STEPS"
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
        --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style linear
        --lr-warmup-iters "$((STEPS / 13))" --weight-decay 0
        --log-interval "$(((STEPS + 12) / 13))" --tensorboard-dir "$WORK/tensorboard"
        "${MACHINE_ARGS[@]}"
    )
}

if [ "${1:-}" = --dry-run ]; then
    # What --use-checkpoint-args says where SmolLM2-135M is imported.
    MODEL_ARGS=(
        --num-layers 30 --hidden-size 576 --ffn-hidden-size 1536 --num-attention-heads 9
        --group-query-attention --num-query-groups 3
        --swiglu --normalization RMSNorm --norm-epsilon 1e-05 --disable-bias-linear
        --rotary-base 100000 --tokenizer-type NullTokenizer --vocab-size 49152
    )
    train_args
    WORLD_SIZE=$GPUS exec "$PYTHON" -m megatron_cream.dry_run "${TRAIN_ARGS[@]}" "${@:2}"
fi

: "${HF:?is not set: it must be a Hugging Face folder, or a name on the hub}"
: "${TEXT:?is not set: it must be files or folders of text to train on}"
: "${HELD_OUT:?is not set: it must be a file or a folder of text to evaluate on}"
MODEL_ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$BASE/hf")
train_args
read -r -a TEXT_PATHS <<<"$TEXT"
read -r -a LENGTH_LIST <<<"$LENGTHS"
mkdir -p "$WORK"
launch_on_one_node "$GPUS"

step "$BASE" "$PYTHON" "$HERE/tools/convert_checkpoint.py" import --hf "$HF" --output "$BASE"

step "$DATA.idx" "$PYTHON" "$HERE/tools/preprocess_data.py" --input "${TEXT_PATHS[@]}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$BASE/hf" \
    --min-tokens "$WINDOW" --workers "${WORKERS:-2}" --output-prefix "$DATA"

# As many as all samples: more than are drawn of them, so that none is read again.
TRAINED=$WORK/run/latest_checkpointed_iteration.txt
if [ "${#DATA_PATH[@]}" -gt 1 ] && [ ! -e "$TRAINED" ]; then
    step "$RETRIEVAL_DATA.idx" "$PYTHON" "$HERE/tools/make_retrieval_data.py" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$BASE/hf" --haystack "${TEXT_PATHS[@]}" \
        --length "$WINDOW" --documents "${RETRIEVAL_DOCUMENTS:-$((STEPS * GLOBAL_BATCH))}" \
        --workers "${WORKERS:-2}" --output-prefix "$RETRIEVAL_DATA"
fi

step "$TRAINED" \
    "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_cream.pretrain "${TRAIN_ARGS[@]}"

step "$WORK/extended" "$PYTHON" "$HERE/tools/convert_checkpoint.py" export \
    --checkpoint "$WORK/run" --output "$WORK/extended"

step "$WORK/perplexity/result.json" "$PYTHON" "$HERE/tools/evaluate.py" perplexity --hf "$WORK/extended" \
    --name "${NAME:-extended}" --data "$HELD_OUT" --documents "$DOCUMENTS" \
    --lengths "${LENGTH_LIST[@]}" --output "$WORK/perplexity"
