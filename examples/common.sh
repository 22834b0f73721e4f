# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the launch scripts share: variables, and arrays of flags by theme; steps.sh has the steps. A script
# sets what its model and its layout are, sources this file, and ends in: extend "$@"
#
#   examples/llama-2-7b/32k.sh                        import, train, export
#   examples/llama-2-7b/32k.sh --dry-run              on a laptop: flags, stages, memory, positions
#   examples/llama-2-7b/32k.sh --lr 1e-5              more of Megatron's flags; the last one counts
#
# Variables that every script takes; docs/examples.md has all of them:
#   HF, BASE         Hugging Face model; the checkpoint that it is imported to, the first time
#   DATA             indexed dataset (tools/preprocess_data.py), without .bin; or a blend: 0.3 a 0.7 b
#   RETRIEVAL_SHARE  of the samples that are documents which ask for what they said (0.5; 0 for none)
#   OUT, EXPORT      checkpoints of this run; Hugging Face folder that it ends in
#   METHOD, ROPE     cream, pose, randpos; yarn, linear (the papers'), ntk, clex ...
#   NODES, NODE_RANK, GPUS_PER_NODE, HEAD, PORT
#   STEPS            any of: import train export
#   RETRIES          new starts after a crash (3)
#   PREFLIGHT        1: looks for a slow node before training
#   PROFILE          torch or nsys: traces some steps of some ranks
#   FP8              1: products of the layers in FP8 (not measured here yet)
#
# USR1 or TERM saves a checkpoint and ends in status 75 (STOPPED_STATUS): start the same command again to go on. An
# import or export has SIGNAL_SECONDS to finish; after that it is stopped, to be made anew.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

say() { echo "$NAME: $*" >&2; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# From the first line on: Slurm signals all processes of a job, whatever each of them is at.
SIGNALLED="" ON_SIGNAL=""
signalled() {
    [ -z "$SIGNALLED" ] || return 0
    SIGNALLED=1
    ${ON_SIGNAL:+"$ON_SIGNAL"}
}
trap signalled USR1 TERM

# shellcheck source=torchrun.sh
source "$HERE/examples/torchrun.sh"
# shellcheck source=steps.sh
source "$HERE/examples/steps.sh"

# Without ROPE the trainer chooses, yarn. It did choose linear: a run that began so is found again and
# goes on so.
run_folder() {
    local run=runs/$NAME-$TARGET_LENGTH-$METHOD
    if [ -z "$ROPE" ] && [ -e "$run-linear" ] && [ ! -e "$run-yarn" ]; then
        echo "$NAME: going on in $run-linear as it began; ROPE=yarn begins another run" >&2
        echo "$run-linear"
    else
        echo "$run-${ROPE:-yarn}"
    fi
}

METHOD=${METHOD:-cream}
ROPE=${ROPE:-}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
BASE=${BASE:-checkpoints/$NAME}
OUT=${OUT:-$(run_folder)}
EXPORT=${EXPORT:-$OUT-hf}
STEPS=${STEPS:-import train export}
SIGNAL_SECONDS=${SIGNAL_SECONDS:-200}
IMPORT_PATIENCE=${IMPORT_PATIENCE:-600}
RETRIES=${RETRIES:-3}
PREFLIGHT=${PREFLIGHT:-0}
BEAT_SECONDS=${BEAT_SECONDS:-5} # between two signs of an import that is under way

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GPU_KIND=${GPU_KIND:-h100} # which the dry run plans for
HEAD=${HEAD:-localhost}
PORT=${PORT:-29500}

MICRO_BATCH=${MICRO_BATCH:-1}
GLOBAL_BATCH=${GLOBAL_BATCH:-32}
ITERATIONS=${ITERATIONS:-1000}
LR=${LR:-2e-5}
WARMUP=${WARMUP:-10}
SAVE_INTERVAL=${SAVE_INTERVAL:-100}
CHECKPOINT_GB=${CHECKPOINT_GB:-0}
LOG_INTERVAL=${LOG_INTERVAL:-10}

# at_least LEAST NAME...: these variables are whole numbers, none is smaller.
at_least() {
    local least=$1 setting
    shift
    for setting in "$@"; do
        if ! [[ ${!setting} =~ ^[0-9]{1,9}$ ]] || ((10#${!setting} < least)); then
            fail "$setting is '${!setting}': it must be a whole number of at least $least"
        fi
    done
}
at_least 1 NODES GPUS_PER_NODE SEQ_LENGTH TARGET_LENGTH ORIGINAL_LENGTH MICRO_BATCH GLOBAL_BATCH
at_least 1 ITERATIONS SAVE_INTERVAL LOG_INTERVAL IMPORT_PATIENCE
at_least 0 NODE_RANK PORT WARMUP RETRIES CHECKPOINT_GB
[ "$NODE_RANK" -lt "$NODES" ] || fail "NODE_RANK is $NODE_RANK: it must be below NODES, $NODES"
command -v "$PYTHON" >/dev/null || fail "PYTHON is $PYTHON: there is no such program"

iteration() { cat "$OUT/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# With --save-retain-interval Megatron removes a checkpoint when the next one is whole, but for those
# of every so many iterations. A script asks for that by PLANNED_RETAIN_INTERVAL, which counts for runs
# that began so (MARK): of a run that has kept its checkpoints, none is removed unless the user says so.
MARK=$OUT/removes-older-checkpoints
SAVE_RETAIN_INTERVAL=${SAVE_RETAIN_INTERVAL:-} RETAINS_AS_PLANNED=""
if [ -z "$SAVE_RETAIN_INTERVAL" ] && { [ "$(iteration)" = 0 ] || [ -e "$MARK" ]; }; then
    SAVE_RETAIN_INTERVAL=${PLANNED_RETAIN_INTERVAL:-}
    RETAINS_AS_PLANNED=$SAVE_RETAIN_INTERVAL
fi
# Megatron takes multiples alone; 0 becomes none, which keeps all.
SAVE_RETAIN_INTERVAL=$(((${SAVE_RETAIN_INTERVAL:-0} + SAVE_INTERVAL - 1) / SAVE_INTERVAL * SAVE_INTERVAL))
SAVE_RETAIN_INTERVAL=${SAVE_RETAIN_INTERVAL#0}

# A share of the samples are documents that ask for what they said a few thousand tokens before, with a
# loss on the answers alone: docs/study.md has what that changes. A run goes on as it began.
SHARE_FILE=$OUT/retrieval-share
if [ -z "${RETRIEVAL_SHARE:-}" ]; then
    RETRIEVAL_SHARE=0.5
    if [ "$(iteration)" != 0 ]; then RETRIEVAL_SHARE=$(cat "$SHARE_FILE" 2>/dev/null || echo 0); fi
fi
[[ $RETRIEVAL_SHARE =~ ^(0|0?\.[0-9]+)$ ]] ||
    fail "RETRIEVAL_SHARE is $RETRIEVAL_SHARE: it must be a share below 1, 0.5 say, or 0 for none"
RETRIEVAL=${RETRIEVAL:-$BASE-retrieval-$SEQ_LENGTH}
read -ra DATA_PATH <<<"${DATA:-}"
[ "${#DATA_PATH[@]}" -gt 0 ] || DATA_PATH=("")
if [ "$RETRIEVAL_SHARE" != 0 ]; then
    [ "${#DATA_PATH[@]}" -gt 1 ] || DATA_PATH=(1 "${DATA_PATH[@]}")
    # Weights of a blend need not add up to 1.
    read -ra DATA_PATH < <(awk -v share="$RETRIEVAL_SHARE" -v data="$RETRIEVAL" '{
        for (i = 1; i < NF; i += 2) sum += $i
        for (i = 1; i < NF; i += 2) printf "%.6g %s ", (1 - share) * $i / sum, $(i + 1)
        printf "%s %s\n", share, data }' <<<"${DATA_PATH[*]}")
fi

POSITION_ARGS=(--position-strategy "$METHOD" ${PLAIN_SHARE:+--plain-share "$PLAIN_SHARE"})

ROPE_ARGS=()
if [ -n "$ROPE" ]; then ROPE_ARGS+=(--rope-interpolation "$ROPE"); fi
if [ "$ROPE" = llama3 ]; then
    # As Llama 3.1 was released, 8 times for 131072 tokens, and more in proportion beyond.
    LLAMA3_FACTOR=$((TARGET_LENGTH > 131072 ? TARGET_LENGTH / 16384 : 8))
    ROPE_ARGS+=(--rope-factor "$LLAMA3_FACTOR")
fi
ROPE_ARGS+=(--original-length "$ORIGINAL_LENGTH")

EXTENSION_ARGS=(
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --target-length "$TARGET_LENGTH" "${POSITION_ARGS[@]}" "${ROPE_ARGS[@]}"
)

# CREAM's recipe, arXiv:2406.07138.
TRAINING_ARGS=(
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --train-iters "$ITERATIONS" --bf16
    --lr "$LR" --min-lr 0 --lr-decay-style linear --lr-warmup-iters "$WARMUP" --weight-decay 0
)

DATA_ARGS=(
    --data-path "${DATA_PATH[@]}" --split "${SPLIT:-99,1,0}"
    --tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE"
    --no-create-attention-mask-in-dataloader
)

CHECKPOINT_ARGS=(
    --pretrained-checkpoint "$BASE" --save "$OUT" --load "$OUT"
    --save-interval "$SAVE_INTERVAL"
    ${SAVE_RETAIN_INTERVAL:+--save-retain-interval "$SAVE_RETAIN_INTERVAL"}
    --eval-interval "${EVAL_INTERVAL:-100}" --eval-iters "${EVAL_ITERS:-4}"
    # Ranks wait for each other while a checkpoint is read: 10 minutes, and those of 2 GB/s.
    --distributed-timeout-minutes "${TIMEOUT_MINUTES:-$((10 + CHECKPOINT_GB / 120))}"
)

# Checkpoints are written while training goes on; a signal ends it with one more.
RESILIENCE_ARGS=(--exit-signal-handler)
if [ "${ASYNC_SAVE:-1}" = 1 ]; then
    RESILIENCE_ARGS+=(--async-save --use-persistent-ckpt-worker --async-strategy mcore)
fi
if [ -n "${EXIT_MINUTES:-}" ]; then
    RESILIENCE_ARGS+=(--exit-duration-in-mins "$EXIT_MINUTES")
fi
if [ "${INPROCESS_RESTART:-0}" = 1 ]; then
    RESILIENCE_ARGS+=(--inprocess-restart)
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-error}
fi

LOGGING_ARGS=(
    --log-interval "$LOG_INTERVAL" --log-throughput
    --tensorboard-dir "${TENSORBOARD:-$OUT/tensorboard}"
    --tensorboard-log-interval "$LOG_INTERVAL"
)
if [ -n "${WANDB_PROJECT:-}" ]; then
    LOGGING_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_NAME:-$(basename "$OUT")}")
fi

# On by default in Megatron beside these: fused norms, RoPE, SwiGLU and attention.
GPU_ARGS=(--manual-gc --manual-gc-interval 100)
LOSS_ARGS=(--cross-entropy-loss-fusion --cross-entropy-fusion-impl native)
# With FP8=1. Weights are gathered in bf16: gathered in FP8, the optimizer would start from rounded ones.
FP8_ARGS=(--fp8-format hybrid --fp8-recipe tensorwise)

# PROFILE=torch writes OUT/torch_profile/rank-N.json.gz, PROFILE=nsys OUT/nsys/node-N.nsys-rep.
PROFILE_ARGS=() PROFILER=()
if [ -n "${PROFILE:-}" ]; then
    read -ra PROFILE_RANKS <<<"${PROFILE_RANKS:-0}"
    read -r FIRST_STEP LAST_STEP <<<"${PROFILE_STEPS:-10 12}"
    PROFILE_ARGS=(
        --profile --profile-ranks "${PROFILE_RANKS[@]}"
        --profile-step-start "$FIRST_STEP" --profile-step-end "$LAST_STEP"
    )
fi
case ${PROFILE:-} in
"") ;;
torch) PROFILE_ARGS+=(--use-pytorch-profiler) ;;
nsys)
    command -v nsys >/dev/null || fail "PROFILE is nsys: Nsight Systems must be installed on every node"
    PROFILER=(
        nsys profile --sample none --trace "cuda,nvtx" --force-overwrite true
        --capture-range cudaProfilerApi --capture-range-end stop --output "$OUT/nsys/node-$NODE_RANK"
    )
    ;;
*) fail "PROFILE is $PROFILE: it must be torch or nsys" ;;
esac

# The exact flags of a run, with those of the command line last.
all_args() {
    ALL_ARGS=(
        "${MODEL_ARGS[@]}" "${EXTENSION_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}"
        "${DATA_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${RESILIENCE_ARGS[@]}" "${LOGGING_ARGS[@]}"
        "${GPU_ARGS[@]}" "${LOSS_ARGS[@]}" "${PROFILE_ARGS[@]}"
    )
    if [ "${FP8:-0}" = 1 ]; then ALL_ARGS+=("${FP8_ARGS[@]}"); fi
    ALL_ARGS+=("$@")
}

# What the steps look at as well is said by a variable, or they would look elsewhere than Megatron.
variable_of() {
    case ${1%%=*} in
    --save | --load) echo OUT ;;
    --pretrained-checkpoint) echo BASE ;;
    --train-iters) echo ITERATIONS ;;
    --save-interval) echo SAVE_INTERVAL ;;
    --save-retain-interval) echo SAVE_RETAIN_INTERVAL ;;
    --data-path) echo DATA ;;
    esac
}

extend() {
    local word dry_run="" given=() variable
    for word in "$@"; do
        variable=$(variable_of "$word")
        [ -z "$variable" ] ||
            fail "${word%%=*} is given: it must be set by $variable, which this script reads as well"
        if [ "$word" = --dry-run ]; then dry_run=1; else given+=("$word"); fi
    done
    set -- "${given[@]}"
    if [ -n "$dry_run" ]; then
        all_args "$@"
        export GPU_KIND GPUS_PER_NODE
        WORLD_SIZE=$((NODES * GPUS_PER_NODE)) exec "$PYTHON" -m megatron_cream.dry_run "${ALL_ARGS[@]}"
    fi
    for step in $STEPS; do
        case $step in
        import | train | export) ;;
        *) fail "STEPS is '$STEPS': it must be made of import, train and export" ;;
        esac
    done
    # ALL_STEPS: what a launcher that starts one step at a time has before it.
    if [[ ${ALL_STEPS:-$STEPS} == *train* && -z ${DATA:-} ]]; then
        fail "DATA is not set: it must be an indexed dataset (docs/data.md), without .bin"
    fi
    [[ $STEPS != *train* ]] || find_data
    [[ ${ALL_STEPS:-$STEPS} != *train* ]] || enough_space
    for step in $STEPS; do
        if [ -n "$SIGNALLED" ]; then stop; fi
        "${step}_step" "$@"
    done
}
