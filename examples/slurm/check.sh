#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Does this Slurm cluster start, stop, requeue and finish a run? A tiny model on the CPUs of two nodes,
# some minutes: it is signalled while it trains, saves, is requeued, goes on, finishes and exports.
#
#   examples/slurm/check.sh                                  # further words are sbatch's own
#   REQUEUES=3 examples/slurm/check.sh --partition debug --account me
#   CONTAINER=apptainer IMAGE=/shared/megatron_cream.sif examples/slurm/check.sh
#
# WORK is the folder for it, on a file system that all nodes see; the job's log stays there.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORK=${WORK:-runs/slurm-check-$(date +%Y%m%d-%H%M%S)}
REQUEUES=${REQUEUES:-1}
MINUTES=${MINUTES:-20}

if [ -e "$WORK" ]; then
    echo "error: WORK is $WORK: it must be a new folder" >&2
    exit 2
fi
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
export WORK
LOG=$WORK/job.log

JOB=$(GPUS_PER_NODE=${GPUS_PER_NODE:-1} sbatch --parsable --nodes 2 --gpus-per-node 0 \
    --time "$MINUTES" --output "$LOG" "$@" "$HERE/run.sh" "$HERE/tiny.sh")
JOB=${JOB%%;*}
echo "job $JOB: two nodes, log in $LOG"
trap 'scancel "$JOB"' INT TERM

fail() {
    echo "error: job $JOB: $*; see $LOG" >&2
    scancel "$JOB" 2>/dev/null || true
    exit 1
}

state() { scontrol --oneliner show job "$JOB" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }

times() { if [ -e "$LOG" ]; then grep -c "$1" "$LOG" || true; else echo 0; fi; }

# wait_until SAID NUMBER: until the log has so many lines of this kind.
wait_until() {
    local now
    until [ "$(times "$1")" -ge "$2" ]; do
        now=$(state)
        case $now in
        PENDING | CONFIGURING | RUNNING | COMPLETING | REQUEUED) sleep 1 ;;
        *) fail "it is $now before its log says '$1' $2 times" ;;
        esac
    done
}

STOPPED='^tiny: stopped at iteration \([0-9]*\) of .*'
for ((i = 1; i <= REQUEUES; i++)); do
    # A line of the trainer that was not there when the job was requeued.
    seen=$(times '^ *\[.*iteration .*lm loss')
    wait_until '^ *\[.*iteration .*lm loss' $((seen + 1))
    scancel --batch --signal=USR1 "$JOB"
    echo "signalled while it trained ($i of $REQUEUES)"
    wait_until 'back into the queue' "$i"
    echo "saved at iteration $(sed -n "s/$STOPPED/\1/p" "$LOG" | tail -n 1), requeued"
done

while :; do
    now=$(state)
    case $now in
    COMPLETED) break ;;
    PENDING | CONFIGURING | RUNNING | COMPLETING | REQUEUED) sleep 1 ;;
    *) fail "it ended $now" ;;
    esac
done
went_on=$(times 'successfully loaded checkpoint from .*/run ')
[ "$went_on" -ge "$REQUEUES" ] || fail "it went on from a checkpoint $went_on times"
[ -f "$WORK/extended/config.json" ] || fail "it is COMPLETED without $WORK/extended"
echo "COMPLETED after $REQUEUES requeues; the exported model is $WORK/extended"
