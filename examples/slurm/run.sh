#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Any launch script on a Slurm cluster, one task per node, each of them torchrun.
#
#   DATA=/shared/books sbatch --nodes 4 examples/slurm/run.sh examples/llama-2-70b/128k.sh
#   CONTAINER=pyxis IMAGE=registry#megatron_cream:gpu MOUNTS=/shared:/shared sbatch ...
#   CONTAINER=apptainer IMAGE=/shared/megatron_cream.sif MOUNTS=/shared:/shared sbatch ...
#
# Start it in the repository, on a file system that all nodes see; BASE and OUT have to be on one as
# well. submit.sh makes jobs of their own of import and export, which need no GPU. 5 minutes before
# the time is up, and where preemption sends the job's own signal (PreemptParameters=send_user_signal),
# a checkpoint is saved and the job is put back into the queue.
# Try it first: examples/slurm/check.sh
#SBATCH --job-name=megatron_cream
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

# The signal comes here (B:), where none is lost between two steps, and goes on to all tasks.
SIGNALLED=""
signalled() {
    SIGNALLED=1
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
}
trap signalled USR1

CONTAINER=${CONTAINER:-none}
if [ $# -eq 0 ]; then
    echo "error: the first argument must be a launch script, examples/llama-2-70b/32k.sh say" >&2
    exit 2
fi
if [ "$CONTAINER" != none ] && [ -z "${IMAGE:-}" ]; then
    echo "error: IMAGE is not set: CONTAINER is $CONTAINER, so it must name an image" >&2
    exit 2
fi

read -r FIRST_NODE < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${HEAD:-$FIRST_NODE} NODES=$SLURM_NNODES
export PORT=$((20000 + SLURM_JOB_ID % 10000))

# Slurm says 8, h100:8 or a100:4,v100:4. None: the launch script's own number.
gpus_of_slurm() {
    local part sum=0
    for part in $(tr , ' ' <<<"${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}"); do
        sum=$((sum + ${part##*:}))
    done
    echo "$sum"
}
if [ -z "${GPUS_PER_NODE:-}" ] && [ "$(gpus_of_slurm)" -gt 0 ]; then
    GPUS_PER_NODE=$(gpus_of_slurm)
    export GPUS_PER_NODE
fi

# All nodes end by themselves, each with its part of the checkpoint written. One that hangs after
# another has ended is ended 15 minutes later.
SRUN_ARGS=(--kill-on-bad-exit=0 --wait=900)
INSIDE=()
case $CONTAINER in
none) ;;
pyxis)
    SRUN_ARGS+=(--container-image "$IMAGE" --container-workdir "$PWD")
    SRUN_ARGS+=(--container-mounts "$PWD:$PWD${MOUNTS:+,$MOUNTS}")
    ;;
apptainer)
    INSIDE=(apptainer exec --nv --pwd "$PWD" --bind "$PWD:$PWD${MOUNTS:+,$MOUNTS}" "$IMAGE")
    ;;
*)
    echo "error: CONTAINER is $CONTAINER: it must be none, pyxis or apptainer" >&2
    exit 2
    ;;
esac

export ALL_STEPS=${STEPS:-import train export} STOPPED_FILE=$PWD/slurm-$SLURM_JOB_ID.stopped
rm -f "$STOPPED_FILE" # of this job, before it was requeued

# One step of the launch script, on its nodes; returns srun's status.
run_step() {
    local nodes=() srun
    [ "$1" = train ] || nodes=(--nodes=1 --ntasks=1 --nodelist="$FIRST_NODE")
    # shellcheck disable=SC2016  # the number of each task's node, there
    STEPS=$1 srun ${nodes[@]+"${nodes[@]}"} "${SRUN_ARGS[@]}" ${INSIDE[@]+"${INSIDE[@]}"} \
        bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' run "${@:2}" &
    srun=$!
    # A signal ends the wait, not srun.
    while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
    wait "$srun"
}

requeue() {
    echo "stopped before the end: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
}

# Node 0 says by a file that it stopped before the end. srun's status is of the node that ended
# worst, which may have been ended because another stopped first.
for step in $ALL_STEPS; do
    if [ -n "$SIGNALLED" ]; then requeue; fi
    status=0
    run_step "$step" "$@" || status=$?
    if [ -e "$STOPPED_FILE" ]; then requeue; fi
    case $status in
    0) ;;
    75) ;; # a node that read an older iteration than node 0; export looks again
    *)
        if [ -n "$SIGNALLED" ]; then requeue; fi
        exit "$status"
        ;;
    esac
done
