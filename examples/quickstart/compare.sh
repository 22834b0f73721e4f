#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Extends one model in several ways and compares what the results can do.
#
#   HF=SmolLM2-135M TEXT=books/train HELD_OUT=books/validation \
#       examples/quickstart/compare.sh cream:linear:4e-4 cream:yarn:4e-4 pose:yarn:4e-4
#
# A way is METHOD:ROPE:LR: run.sh's commands in WORK/METHOD-ROPE-LR, then passkey and needle at
# every length, ten depths by three seeds. "before" is the model as it was, "untrained-ROPE" the same
# with that interpolation, unless it is one that has to be trained. A table and a picture a task end up
# in WORK/compare. Every name in capitals that run.sh knows can be set. What is done is not repeated:
# once base, text and retrieval documents are there, several GPUs can take ways of their own (CUDA_VISIBLE_DEVICES), and a
# last call with all ways compares them.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}
WORK=${WORK:-runs/methods}
DTYPE=${DTYPE:-bfloat16}
: "${HF:?is not set: it must be a Hugging Face folder}"
: "${TEXT:?is not set: it must be files or folders of text to train on}"
: "${HELD_OUT:?is not set: it must be a file or a folder of text to evaluate on}"
# shellcheck source=lengths.sh
source "$HERE/examples/quickstart/lengths.sh"
export PYTHON WINDOW TARGET LENGTHS DOCUMENTS BASE=$WORK/base DATA=$WORK/text
export RETRIEVAL_DATA=$WORK/retrieval
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
read -r -a LENGTH_LIST <<<"$LENGTHS"

# A way that cannot be trained is refused before the first one is.
UNTRAINED=$("$PYTHON" "$HERE/examples/quickstart/ways.py" "$@")
NAMES=(before)

# score TASK MODEL NAME [FLAGS]; one that was stopped goes on from its cases.
score() {
    [ -e "$WORK/$3/$1/result.json" ] ||
        "$PYTHON" "$HERE/tools/evaluate.py" "$1" --hf "$2" --name "$3" --dtype "$DTYPE" \
            --lengths "${LENGTH_LIST[@]}" --output "$WORK/$3/$1" "${@:4}"
}

# Two small tasks have room on one GPU.
retrieve() {
    score needle "$@" --cases 10 --seeds 3 &
    score passkey "$@" --cases 10 --seeds 3
    wait $!
}

all_tasks() {
    score perplexity "$HF" "$@" --data "$HELD_OUT" --documents "$DOCUMENTS"
    retrieve "$HF" "$@"
}

all_tasks before
FACTOR=$("$PYTHON" -c "print($TARGET / $WINDOW)")
for rope in $UNTRAINED; do
    all_tasks "untrained-$rope" --rope-interpolation "$rope" --rope-factor "$FACTOR"
    NAMES+=("untrained-$rope")
done
for way in "$@"; do
    name=${way//:/-}
    NAMES+=("$name")
    IFS=: read -r METHOD ROPE LR <<<"$way"
    METHOD=$METHOD ROPE=$ROPE LR=$LR NAME=$name WORK=$WORK/$name \
        "$HERE/examples/quickstart/run.sh"
    retrieve "$WORK/$name/extended" "$name"
done

for task in perplexity passkey needle; do
    runs=()
    for name in "${NAMES[@]}"; do
        runs+=("$WORK/$name/$task")
    done
    "$PYTHON" "$HERE/tools/evaluate.py" compare "${runs[@]}" --output "$WORK/compare/$task"
done
