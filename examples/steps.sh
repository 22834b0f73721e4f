# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# The steps of a launch script, for common.sh: import, training and export, and how each is signalled,
# stopped, and started again after a crash.
# shellcheck disable=SC2034,SC2153  # variables are those of common.sh

# Before an import, which may take hours. What an object store has is not looked at.
find_data() {
    local word
    for word in $DATA; do
        [[ $word =~ ^[0-9.eE-]+$ || $word == *://* || -f $word.idx ]] ||
            fail "DATA is $DATA: there is no $word.idx; it must be an indexed dataset (docs/data.md), without .bin"
    done
}

# Where a file system does not know its own limit (a quota, a bucket), df says more and nothing is
# refused.
enough_space() {
    local folder=$OUT free most
    [ "$NODE_RANK" = 0 ] || return 0
    while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
    [ -d "$folder" ] && [ -w "$folder" ] || fail "OUT is $OUT: $folder must be a folder that can be written to"
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
    exit "${STOPPED_STATUS:-75}"
}

import_step() {
    make_once "$BASE" "has_checkpoint $BASE" convert \
        "$HERE/tools/convert_checkpoint.py" import --hf "$HF" --output "$BASE"
    # Needs no GPU either.
    [ "$RETRIEVAL_SHARE" = 0 ] || make_once "$RETRIEVAL" "test -f $RETRIEVAL.idx" make_documents
}

# By the model's own tokenizer, which an import keeps; with bos where the text has it; so many that none
# is read twice.
make_documents() {
    local tokenizer haystack words=() number
    for tokenizer in "$BASE/release/hf" "$BASE/hf" "$HF"; do
        [ ! -d "$tokenizer" ] || break
    done
    read -ra haystack <<<"${HAYSTACK:-}"
    [ ${#haystack[@]} = 0 ] || words+=(--haystack "${haystack[@]}")
    if grep -qs '"prepended_bos": true' "${DATA_PATH[1]:-}.json"; then words+=(--prepend-bos); fi
    number=$(awk "BEGIN { print int(1.1 * $RETRIEVAL_SHARE * $ITERATIONS * $GLOBAL_BATCH) + 1 }")
    convert "$HERE/tools/make_retrieval_data.py" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" --length "$SEQ_LENGTH" \
        --documents "$number" --answers-only "${words[@]}" \
        --workers "${WORKERS:-8}" --output-prefix "$RETRIEVAL"
}

# make_once WHAT IS_THERE COMMAND...: node 0 makes what is not there yet, and other nodes wait for it.
make_once() {
    local what=$1 is_there=$2
    shift 2
    if $is_there; then
        say "$what is there: it is not made again"
    elif [ "$NODE_RANK" = 0 ]; then
        beat "$what" "$is_there" >/dev/null 2>&1 &
        "$@"
    else
        wait_for "$what" "$is_there"
    fi
    if [ -n "$SIGNALLED" ]; then stop; fi
}

# Says to the nodes that wait that it is being made, as long as this shell lives and makes it.
beat() {
    local count=0
    trap '' USR1
    trap - TERM
    mkdir -p "$(dirname "$1")"
    while kill -0 $$ 2>/dev/null && ! $2; do
        echo "$(date +%s) $((++count))" >"$1.importing"
        sleep "$BEAT_SECONDS" || true
    done
    rm -f "$1.importing"
}

# It gets its name when it is whole. Clocks of nodes differ, so a beat is new when it is another than
# the last one.
wait_for() {
    local last="" now since=$SECONDS
    say "waiting for node 0 to make $1"
    until $2; do
        [ -z "$SIGNALLED" ] || stop
        now=$(cat "$1.importing" 2>/dev/null || true)
        if [ "$now" != "$last" ]; then last=$now since=$SECONDS; fi
        [ $((SECONDS - since)) -lt "$IMPORT_PATIENCE" ] ||
            fail "$1 is not there: node 0 makes nothing of it since $IMPORT_PATIENCE seconds (IMPORT_PATIENCE)"
        sleep "$BEAT_SECONDS" || true # it gets the signal as well
    done
}

# Of Megatron's own: a tracker, or the file of a folder that is one checkpoint.
has_checkpoint() {
    [ -f "$1/latest_checkpointed_iteration.txt" ] || [ -f "$1/metadata.json" ]
}

# What needs a CPU alone. Folders get their names when they are whole, so one that is stopped leaves
# nothing that the next one would take for a checkpoint.
convert() {
    local status=0
    TIMER=
    child finish_soon "$PYTHON" "$@" || status=$?
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
    [ "$RETRIEVAL_SHARE" = 0 ] || [ -f "$RETRIEVAL.idx" ] || fail "RETRIEVAL is $RETRIEVAL: there is no" \
        "such dataset; the step import makes it, RETRIEVAL_SHARE=0 trains without"
    say_retention
    if [ "$NODE_RANK" = 0 ]; then mkdir -p "$OUT" && echo "$RETRIEVAL_SHARE" >"$SHARE_FILE"; fi
    all_args "$@"
    set_environment
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
    [ ${#PROFILER[@]} = 0 ] || mkdir -p "$OUT/nsys"
    until attempt; do :; done
    finished || stop # EXIT_MINUTES
}

# One start of the trainer; fails where there should be another.
CRASHES=0 CRASHED_AT=""
attempt() {
    local status=0
    ERRORS=$(mktemp -d)
    if [ "$PREFLIGHT" = 1 ]; then
        child save_now "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" \
            --log-dir "$ERRORS" -m megatron_cream preflight || status=$?
    fi
    [ "$status" != 0 ] || child save_now "${PROFILER[@]}" "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" \
        --log-dir "$ERRORS" -m megatron_cream.pretrain "${ALL_ARGS[@]}" || status=$?
    # The signal may come before a worker can save, or end one whose peers are gone: go on later.
    if [ -n "$SIGNALLED" ]; then stop; fi
    [ "$status" != 0 ] || return 0
    # What a user has to mend is no crash.
    if grep -rqs '"message": "error: ' "$ERRORS"; then exit 2; fi
    rm -rf "$ERRORS"
    retry_or_end "$status"
}

# After a crash the newest checkpoint is gone on from, RETRIES times at most. Where two crashes have the
# same one, something ends the run there each time, and a third start would only hold GPUs.
retry_or_end() {
    local now
    now=$(iteration)
    CRASHES=$((CRASHES + 1))
    if [ "$CRASHES" -gt "$RETRIES" ]; then
        say "crash $CRASHES, exit status $1: no start is left (RETRIES=$RETRIES)"
        exit "$1"
    elif [ "$now" = "$CRASHED_AT" ]; then
        say "crashed twice since the checkpoint of iteration $now: it is not started again"
        exit "$1"
    fi
    CRASHED_AT=$now
    say "crash $CRASHES, exit status $1: going on from iteration $now, $((RETRIES - CRASHES)) more starts are left"
    return 1
}

finished() { [ "$(iteration)" -ge "$ITERATIONS" ]; }

python_does() { (trap "" USR1 && exec "$PYTHON" -c "$1") 2>/dev/null; }

# Environment variables of NVIDIA's recipes for Hopper; one that is set already is kept.
set_environment() {
    # Freed memory is joined again, so that none is lost to fragments.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    [ $((NODES * GPUS_PER_NODE)) -gt 1 ] || return 0
    # Multicast buffers of NCCL would take memory of every GPU, and its links do not need them.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # NCCL cannot register expandable segments; with CUDA graphs Megatron asks for this.
    export NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0}
    # Norms leave 16 multiprocessors to what is sent meanwhile.
    export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}
    export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}
    # Where layers send, kernels start in the order of the host: sending before the product that hides
    # it. Elsewhere gradients and stages need not wait in one queue with products.
    local connections=8
    if [[ " ${ALL_ARGS[*]} " =~ --(tensor-model|context)-parallel-size\ ([2-9]|[1-9][0-9]+)\  ]]; then
        connections=1
    fi
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-$connections}
}

# What a run can use of this machine; flags of the command line still come last.
ask_machine() {
    # The output layer adds gradients up in a kernel of Apex, which NGC's images have.
    if ! python_does "import fused_weight_gradient_mlp_cuda"; then
        say "Apex's fused_weight_gradient_mlp_cuda is not installed: --no-gradient-accumulation-fusion"
        GPU_ARGS+=(--no-gradient-accumulation-fusion)
    fi
    # Megatron refuses these where there is no GPU, so a dry run goes without: tokens are sorted by
    # expert in one kernel, and the experts of a rank are one product.
    if [[ ${MODEL_ARGS[*]} == *--num-experts* ]]; then
        GPU_ARGS+=(--moe-permute-fusion --moe-grouped-gemm)
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
    convert "$HERE/tools/convert_checkpoint.py" export --checkpoint "$OUT" --output "$EXPORT"
}
