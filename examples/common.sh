# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the launch scripts share: variables, arrays of flags by theme, and the three steps. A script
# sets what its model and its layout are, sources this file, and ends in: extend "$@"
#
#   examples/llama-2-7b/32k.sh                        import, train, export
#   examples/llama-2-7b/32k.sh --dry-run              on a laptop: flags, stages, memory, positions
#   examples/llama-2-7b/32k.sh --lr 1e-5              more of Megatron's flags; the last one counts
#
# Variables that every script takes; docs/examples.md has all of them:
#   HF, BASE         Hugging Face model; the checkpoint that it is imported to, the first time
#   DATA             indexed dataset (tools/preprocess_data.py), without .bin
#   OUT, EXPORT      checkpoints of this run; Hugging Face folder that it ends in
#   METHOD, ROPE     cream, pose, randpos; yarn, linear (the papers'), ntk, clex ...
#   NODES, NODE_RANK, GPUS_PER_NODE, HEAD, PORT
#   STEPS            any of: import train export
#   FP8              1: products of the layers in FP8 (not measured here yet)
#
# USR1 or TERM saves a checkpoint and ends in status 75: start the same command again to go on. An
# import or export has SIGNAL_SECONDS to finish; after that it is stopped, to be made anew.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

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
CHECKPOINT_GB=${CHECKPOINT_GB:-0}
LOG_INTERVAL=${LOG_INTERVAL:-10}

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
    --data-path "${DATA:-}" --split "${SPLIT:-99,1,0}"
    --tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE"
    --no-create-attention-mask-in-dataloader
)

CHECKPOINT_ARGS=(
    --pretrained-checkpoint "$BASE" --save "$OUT" --load "$OUT"
    --save-interval "$SAVE_INTERVAL"
    ${SAVE_RETAIN_INTERVAL:+--save-retain-interval "$SAVE_RETAIN_INTERVAL"}
    --eval-interval "${EVAL_INTERVAL:-100}" --eval-iters "${EVAL_ITERS:-4}"
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

say() { echo "$NAME: $*" >&2; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# The exact flags of a run, with those of the command line last.
all_args() {
    ALL_ARGS=(
        "${MODEL_ARGS[@]}" "${EXTENSION_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}"
        "${DATA_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${RESILIENCE_ARGS[@]}" "${LOGGING_ARGS[@]}"
        "${GPU_ARGS[@]}" "${LOSS_ARGS[@]}"
    )
    if [ "${FP8:-0}" = 1 ]; then ALL_ARGS+=("${FP8_ARGS[@]}"); fi
    ALL_ARGS+=("$@")
}

extend() {
    local word dry_run="" given=()
    for word in "$@"; do
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
    [[ ${ALL_STEPS:-$STEPS} != *train* ]] || enough_space
    for step in $STEPS; do
        if [ -n "$SIGNALLED" ]; then stop; fi
        "${step}_step" "$@"
    done
}

# Where a file system does not know its own limit (a quota, a bucket), df says more and nothing is
# refused.
enough_space() {
    local folder=$OUT free most
    [ "$NODE_RANK" = 0 ] || return 0
    while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pk "$folder" 2>/dev/null | awk 'NR == 2 { print $4 }' || true)
    [[ $free =~ ^[0-9]+$ ]] || return 0
    free=$((free * 1024 / 1000000000)) most=$(most_checkpoints)
    [ "$free" -ge $((most * CHECKPOINT_GB)) ] || fail "OUT is $OUT: $free GB are free there, it must have" \
        "$((most * CHECKPOINT_GB)) for $most checkpoints of $CHECKPOINT_GB (fewer: SAVE_INTERVAL," \
        "SAVE_RETAIN_INTERVAL; CHECKPOINT_GB=0 starts without asking)"
}

# Most checkpoints that a run will have at once beside those that it has now. One that is not retained
# goes when the next one is whole.
most_checkpoints() {
    local here=0 most=0 last now
    now=$(iteration)
    while [ "$now" -lt "$ITERATIONS" ]; do
        last=$now
        now=$(((now / SAVE_INTERVAL + 1) * SAVE_INTERVAL))
        if [ "$now" -gt "$ITERATIONS" ]; then now=$ITERATIONS; fi
        here=$((here + 1))
        if [ "$here" -gt "$most" ]; then most=$here; fi
        if [ -n "$SAVE_RETAIN_INTERVAL" ] && [ $((last % ${SAVE_RETAIN_INTERVAL:-1})) != 0 ]; then
            here=$((here - 1))
        fi
    done
    echo "$most"
}

# Node 0 says which checkpoints will be removed, and marks a run whose script decided that.
say_retention() {
    [ "$NODE_RANK" = 0 ] || return 0
    if [ -n "$RETAINS_AS_PLANNED" ]; then
        mkdir -p "$OUT"
        touch "$MARK"
    else
        rm -f "$MARK"
    fi
    if [ -n "$SAVE_RETAIN_INTERVAL" ]; then
        say "a checkpoint is removed when the next one is whole, but for those of every" \
            "$SAVE_RETAIN_INTERVAL iterations (SAVE_RETAIN_INTERVAL=0 keeps all)"
    elif [ -n "${PLANNED_RETAIN_INTERVAL:-}" ]; then
        say "all checkpoints are kept (SAVE_RETAIN_INTERVAL=$PLANNED_RETAIN_INTERVAL removes older ones)"
    fi
}

# A launcher that may start the run again looks for STOPPED_FILE, and not at exit statuses, which
# tell of the node that ended worst.
stop() {
    say "stopped at iteration $(iteration) of $ITERATIONS: the same command goes on from there"
    if [ "$NODE_RANK" = 0 ] && [ -n "${STOPPED_FILE:-}" ]; then
        iteration >"$STOPPED_FILE"
    fi
    exit 75
}

import_step() {
    if has_checkpoint "$BASE"; then
        say "$BASE is there: it is not imported again"
    elif [ "$NODE_RANK" = 0 ]; then
        beat >/dev/null 2>&1 &
        convert import --hf "$HF" --output "$BASE"
    else
        wait_for_import
    fi
    if [ -n "$SIGNALLED" ]; then stop; fi
}

# Says to the nodes that wait that the import is under way, as long as this shell lives and imports.
beat() {
    local count=0
    trap '' USR1
    trap - TERM
    mkdir -p "$(dirname "$BASE")"
    while kill -0 $$ 2>/dev/null && ! has_checkpoint "$BASE"; do
        echo "$(date +%s) $((++count))" >"$BASE.importing"
        sleep "$BEAT_SECONDS" || true
    done
    rm -f "$BASE.importing"
}

# The folder gets its name when it is whole. Clocks of nodes differ, so a beat is new when it is
# another than the last one.
wait_for_import() {
    local last="" now since=$SECONDS
    say "waiting for node 0 to import $HF to $BASE"
    until has_checkpoint "$BASE"; do
        [ -z "$SIGNALLED" ] || stop
        now=$(cat "$BASE.importing" 2>/dev/null || true)
        if [ "$now" != "$last" ]; then last=$now since=$SECONDS; fi
        [ $((SECONDS - since)) -lt "$IMPORT_PATIENCE" ] ||
            fail "BASE is $BASE: node 0 imports nothing to it since $IMPORT_PATIENCE seconds (IMPORT_PATIENCE)"
        sleep "$BEAT_SECONDS" || true # it gets the signal as well
    done
}

# Of Megatron's own: a tracker, or the file of a folder that is one checkpoint.
has_checkpoint() {
    [ -f "$1/latest_checkpointed_iteration.txt" ] || [ -f "$1/metadata.json" ]
}

# An import or export. Folders get their names when they are whole, so one that is stopped leaves
# nothing that the next one would take for a checkpoint.
convert() {
    local status=0
    TIMER=
    child finish_soon "$PYTHON" "$HERE/tools/convert_checkpoint.py" "$@" || status=$?
    [ -z "$TIMER" ] || kill "$TIMER" 2>/dev/null || true
    if [ "$status" != 0 ] && [ -n "$SIGNALLED" ]; then stop; fi
    return "$status"
}

finish_soon() {
    say "a signal: this step has $SIGNAL_SECONDS seconds to finish"
    (
        trap '' USR1
        sleep "$SIGNAL_SECONDS" &
        # shellcheck disable=SC2064  # the number of this process, now
        trap "kill $! 2>/dev/null; exit" TERM
        wait $! && kill -TERM "$CHILD"
    ) >/dev/null 2>&1 &
    TIMER=$!
}

# child ON_SIGNAL COMMAND...: runs a command to its end and returns its status; ON_SIGNAL is called
# at a signal. The command never sees USR1, which ends what does not handle it; Ctrl-C ends it.
child() {
    local on_signal=$1
    shift
    (
        trap '' USR1
        trap - INT TERM
        exec "$@"
    ) &
    CHILD=$!
    ON_SIGNAL=$on_signal
    [ -z "$SIGNALLED" ] || "$on_signal"
    # A signal ends the wait, not the child.
    until ended "$CHILD"; do wait "$CHILD" || true; done
    ON_SIGNAL=
    wait "$CHILD"
}

ended() { ! kill -0 "$1" 2>/dev/null; }

train_step() {
    if finished; then
        say "$OUT has all $ITERATIONS iterations"
        return
    fi
    say_retention
    ask_machine
    all_args "$@"
    if [ "$NODES" = 1 ]; then
        launch_on_one_node "$GPUS_PER_NODE"
    else
        LAUNCH_ARGS=(
            --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE"
            --master-addr "$HEAD" --master-port "$PORT"
        )
    fi
    local status=0
    child save_now "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" \
        -m megatron_cream.pretrain "${ALL_ARGS[@]}" || status=$?
    # The signal may come before a worker can save, or end one whose peers are gone: go on later.
    if [ -n "$SIGNALLED" ]; then stop; fi
    if [ "$status" != 0 ]; then exit "$status"; fi
    finished || stop # EXIT_MINUTES
}

finished() { [ "$(iteration)" -ge "$ITERATIONS" ]; }

python_does() { (trap "" USR1 && exec "$PYTHON" -c "$1") 2>/dev/null; }

# What a run can use of this machine; flags of the command line still come last.
ask_machine() {
    # The output layer adds gradients up in a kernel of Apex, which NGC's images have.
    if ! python_does "import fused_weight_gradient_mlp_cuda"; then
        say "Apex's fused_weight_gradient_mlp_cuda is not installed: --no-gradient-accumulation-fusion"
        GPU_ARGS+=(--no-gradient-accumulation-fusion)
    fi
    # Before 2.19 Transformer Engine's cross entropy was not one to train with.
    if python_does "from megatron_cream.extras.te_cross_entropy import why_absent as why; exit(bool(why()))"; then
        LOSS_ARGS=(--te-cross-entropy)
    fi
    # An async save hands tensors to another process, expandable ones by pidfd_getfd (number 438).
    if [[ ${RESILIENCE_ARGS[*]} == *--async-save* && ${PYTORCH_CUDA_ALLOC_CONF:-} == *expandable_segments:True* ]] &&
        ! python_does "$MAY_SHARE"; then
        say "this system does not let processes share expandable segments: PYTORCH_CUDA_ALLOC_CONF is unset"
        unset PYTORCH_CUDA_ALLOC_CONF
    fi
}

MAY_SHARE='
import ctypes, os
theirs = os.open("/dev/null", os.O_RDONLY)
child = os.fork()
if not child:
    call = ctypes.CDLL(None).syscall
    os._exit(call(438, os.pidfd_open(os.getppid()), theirs, 0) < 0)
exit(bool(os.waitpid(child, 0)[1]))'

# torchrun gives its workers 30 s after a TERM. A checkpoint may take longer, so a signal goes past
# it to the workers, which save one, and torchrun ends when they do. It may not have started them.
save_now() {
    until pkill -TERM -P "$CHILD" || ended "$CHILD"; do sleep 1 || true; done
}

export_step() {
    [ "$NODE_RANK" = 0 ] || return 0
    if [ -e "$EXPORT" ]; then
        say "$EXPORT is there: it is not written again"
        return
    fi
    finished || fail "$OUT is at iteration $(iteration): it must reach $ITERATIONS to be exported"
    convert export --checkpoint "$OUT" --output "$EXPORT"
}
