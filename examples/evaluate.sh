#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Several checkpoints, each at several lengths: megatron-cream evaluate for each pair, shared out over
# jobs. Further words are its flags.
#
#   CHECKPOINTS="runs/a/iter_0000500 runs/a" LENGTHS="4K 32K" examples/evaluate.sh --documents 8
#   STEPS=evaluate sbatch --array 0-3 --nodes 1 --gpus-per-node 4 examples/slurm/run.sh \
#       examples/evaluate.sh --documents 8       # with CHECKPOINTS and LENGTHS as above
#
#   CHECKPOINTS      Megatron's (a run, or one iteration in it) or Hugging Face folders
#   LENGTHS, TASKS   in tokens; of megatron-cream evaluate (all)
#   DATA             held-out text for perplexity
#   OUTPUT           results: OUTPUT/TASK/CHECKPOINT/LENGTH, which evaluate compare joins (runs/evaluation)
#   GPUS_PER_NODE    GPUs that a model is split over (1; under Slurm: Slurm's)
#   SHARD, SHARDS    this job's share of the pairs: Slurm's and Kubernetes' numbers, or yours
#
# A pair that is done is not evaluated again, and one that was stopped goes on.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck source=torchrun.sh
source "$HERE/examples/torchrun.sh"

fail() {
    echo "error: $*" >&2
    exit 2
}

read -ra CHECKPOINTS <<<"${CHECKPOINTS:-}"
read -ra LENGTHS <<<"${LENGTHS:-}"
read -ra TASKS <<<"${TASKS:-all}"
[ ${#CHECKPOINTS[@]} -gt 0 ] || fail "CHECKPOINTS is not set: it must name folders of models"
[ ${#LENGTHS[@]} -gt 0 ] || fail "LENGTHS is not set: it must be lengths in tokens, 4K 32K say"
for checkpoint in "${CHECKPOINTS[@]}"; do
    [ -d "$checkpoint" ] || fail "CHECKPOINTS has $checkpoint: it must be a folder"
done

# name_of CHECKPOINT: of its results.
name_of() {
    if [[ $(basename "$1") == iter_* ]]; then
        echo "$(basename "$(dirname "$1")")-$(basename "$1")"
    else
        basename "$1"
    fi
}
TWICE=$(for checkpoint in "${CHECKPOINTS[@]}"; do name_of "$checkpoint"; done | sort | uniq -d)
[ -z "$TWICE" ] || fail "CHECKPOINTS has two folders named" \
    "${TWICE%%$'\n'*}, whose results would be one: rename one"
OUTPUT=${OUTPUT:-runs/evaluation}
GPUS=${GPUS_PER_NODE:-1}
SHARD=${SHARD:-${SLURM_ARRAY_TASK_ID:-${JOB_COMPLETION_INDEX:-0}}}
SHARDS=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-1}}
[ "$SHARD" -lt "$SHARDS" ] || fail "SHARD is $SHARD: it must be below SHARDS, $SHARDS (an array begins at 0)"

LAUNCH=("$PYTHON" -m megatron_cream)
if [ "$GPUS" -gt 1 ]; then
    launch_on_one_node "$GPUS"
    LAUNCH=("$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_cream)
fi

# evaluate CHECKPOINT LENGTH FLAGS...: every task of one pair.
evaluate() {
    local task model=(--checkpoint "$1") name length=$2
    name=$(name_of "$1")
    if [ -f "$1/config.json" ]; then model=(--hf "$1"); fi
    for task in "${TASKS[@]}"; do
        "${LAUNCH[@]}" evaluate "$task" "${model[@]}" --name "$name" --lengths "$length" ${DATA:+--data "$DATA"} \
            --tensor-model-parallel-size "$GPUS" --output "$OUTPUT/$task/$name/$length" "${@:3}"
    done
}

pair=0
for checkpoint in "${CHECKPOINTS[@]}"; do
    for length in "${LENGTHS[@]}"; do
        if [ $((pair % SHARDS)) = "$SHARD" ]; then evaluate "$checkpoint" "$length" "$@"; fi
        pair=$((pair + 1))
    done
done
