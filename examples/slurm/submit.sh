#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Import, training and export of a launch script as three jobs, each after the one before: import and
# export hold one node and no GPU. Further words are sbatch's own, for all three.
#
#   DATA=/shared/books examples/slurm/submit.sh examples/llama-2-70b/128k.sh --account me
#   CPU_SBATCH="--partition cpu --mem 64G" GPU_SBATCH="--partition gpu" DATA=... examples/slurm/submit.sh ...
#
# Nodes are the script's own number unless NODES says another. Training is signalled early enough to save:
# 2 minutes and the time of a checkpoint at SAVE_GBS (2) GB/s, at least 5 minutes. A job whose import
# or training failed is cancelled. Import and export ask for 8 CPUs and 32 GB of a node that others may
# use as well, in the cluster's default partition unless CPU_SBATCH names another.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=${1:-}
if [ ! -f "$SCRIPT" ]; then
    echo "error: the first argument is '$SCRIPT': it must be a launch script, examples/llama-2-70b/128k.sh say" >&2
    exit 2
fi
shift
# Not known to the import alone, and hours later it would be missed.
if [ -z "${DATA:-}" ] && ! grep -q '^DATA=' "$SCRIPT"; then
    echo "error: DATA is not set: it must be an indexed dataset (docs/data.md), without .bin" >&2
    exit 2
fi

# of NAME OTHERWISE: what the launch script says, as NAME=7 or NAME=${NAME:-7}.
of() {
    local value
    value=$(sed -n "s/^$1=\(\${$1:-\)\{0,1\}\([0-9]*\)}\{0,1\}$/\2/p" "$SCRIPT")
    echo "${value:-$2}"
}
NODES=${NODES:-$(of NODES 1)}
LAST=$((120 + $(of CHECKPOINT_GB 0) / ${SAVE_GBS:-2}))
if [ "$LAST" -lt 300 ]; then LAST=300; fi

read -ra ON_CPUS <<<"${CPU_SBATCH:-}"
read -ra ON_GPUS <<<"${GPU_SBATCH:-}"

# Training has its nodes for itself. No flag of sbatch takes that back, so the others leave it out.
SHARED=$(mktemp)
trap 'rm -f "$SHARED"' EXIT
grep -v '^#SBATCH --exclusive$' "$HERE/run.sh" >"$SHARED"

# job STEP RUN WORDS...: its number; further steps wait for it to end well.
job() {
    local step=$1 run=$2
    shift 2
    STEPS=$step sbatch --parsable --kill-on-invalid-dep=yes "$@" "$run" "$SCRIPT" | cut -d';' -f1
}
# sbatch has said why; the jobs before the one that it refused would be of no use.
none_at_all() {
    scancel "$@"
    echo "error: not all three jobs were accepted: $* cancelled" >&2
    exit 1
}
ON_ONE=(--nodes 1 --gpus-per-node 0 --cpus-per-task 8 --mem 32G ${ON_CPUS[@]+"${ON_CPUS[@]}"} "$@")
ON_ALL=(--nodes "$NODES" --signal "B:USR1@$LAST" ${ON_GPUS[@]+"${ON_GPUS[@]}"} "$@")

[ -n "${CPU_SBATCH:-}" ] ||
    echo "import and export: 8 CPUs and 32 GB each in the default partition (CPU_SBATCH names another)"
IMPORT=$(job import "$SHARED" "${ON_ONE[@]}")
TRAIN=$(job train "$HERE/run.sh" --dependency "afterok:$IMPORT" "${ON_ALL[@]}") || none_at_all "$IMPORT"
EXPORT=$(job export "$SHARED" --dependency "afterok:$TRAIN" "${ON_ONE[@]}") || none_at_all "$IMPORT" "$TRAIN"
echo "jobs: import $IMPORT, training $TRAIN on $NODES nodes, export $EXPORT; scancel $IMPORT $TRAIN $EXPORT ends them"
