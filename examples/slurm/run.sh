#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Any launch script on a Slurm cluster, one task a node, each of them torchrun.
#
#   DATA=/shared/books sbatch --nodes 8 examples/slurm/run.sh examples/llama-2-70b/128k.sh
#   CONTAINER=pyxis IMAGE=registry#megatron_cream:gpu MOUNTS=/shared:/shared sbatch ...
#   CONTAINER=apptainer IMAGE=/shared/megatron_cream.sif MOUNTS=/shared:/shared sbatch ...
#
# Start it in the repository, on a file system that all nodes see; BASE and OUT have to be on one as
# well. 5 minutes before the time is up, and where preemption sends the job's own signal
# (PreemptParameters=send_user_signal), a checkpoint is saved and the job is put back into the queue.
#SBATCH --job-name=megatron_cream
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

CONTAINER=${CONTAINER:-none}
if [ $# -eq 0 ]; then
    echo "error: the first argument must be a launch script, examples/llama-2-70b/32k.sh say" >&2
    exit 2
fi
if [ "$CONTAINER" != none ] && [ -z "${IMAGE:-}" ]; then
    echo "error: IMAGE is not set: CONTAINER is $CONTAINER, so it must name an image" >&2
    exit 2
fi

read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD NODES=$SLURM_NNODES
export PORT=$((20000 + SLURM_JOB_ID % 10000))

SRUN_ARGS=(--kill-on-bad-exit=1)
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

status=0
# shellcheck disable=SC2016  # the number of each task's node, there
srun "${SRUN_ARGS[@]}" ${INSIDE[@]+"${INSIDE[@]}"} \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' run "$@" || status=$?

if [ "$status" = 75 ]; then
    echo "stopped before the end: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
