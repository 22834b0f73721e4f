#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Extends one model in several ways and compares what the results can do.
#
#   HF=SmolLM2-135M TEXT=books/train HELD_OUT=books/validation TARGET=32K \
#       examples/quickstart/compare.sh cream:linear:4e-4 cream:yarn:4e-4 pose:yarn:4e-4
#
# A way is METHOD:ROPE:LR: megatron-cream extend into WORK/METHOD-ROPE-LR, with the import, text and
# scores of the first way. EXTEND_ARGS has more flags for all of them. A table and a picture per task
# end up in WORK/compare. What is done is not repeated: once the first way is there, several GPUs can
# take ways of their own (CUDA_VISIBLE_DEVICES), and a last call with all ways compares them.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}
WORK=${WORK:-runs/methods}
: "${HF:?is not set: it must be a Hugging Face folder}"
: "${TEXT:?is not set: it must be files or folders of text to train on}"
: "${HELD_OUT:?is not set: it must be a file or a folder of text to evaluate on}"
: "${TARGET:?is not set: it must be the new window in tokens, such as 32K}"
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
read -r -a TEXT_PATHS <<<"$TEXT"
read -r -a HELD_OUT_PATHS <<<"$HELD_OUT"
read -r -a MORE <<<"${EXTEND_ARGS:-}"

[ $# -gt 0 ] || {
    echo "error: no way is given: each must be METHOD:ROPE:LR, as cream:yarn:4e-4" >&2
    exit 2
}

# extend_in WAY [FLAGS]
extend_in() {
    local method rope rate
    IFS=: read -r method rope rate <<<"$1"
    "$PYTHON" -m megatron_cream extend --hf "$HF" --text "${TEXT_PATHS[@]}" --held-out "${HELD_OUT_PATHS[@]}" \
        --target-length "$TARGET" --position-strategy "$method" --rope-interpolation "$rope" \
        --lr "$rate" --tasks passkey needle --cases 10 --output "$WORK/${1//:/-}" "${MORE[@]}" "${@:2}"
}

for way in "$@"; do # one that cannot be trained is refused before the first is
    extend_in "$way" --dry-run >/dev/null
done
first=$WORK/${1//:/-}.work
extend_in "$1"
for way in "${@:2}"; do
    extend_in "$way" --reuse "$first"
done

for task in perplexity passkey needle; do
    runs=("$first/before/$task")
    for way in "$@"; do
        runs+=("$WORK/${way//:/-}.work/after/$task")
    done
    "$PYTHON" -m megatron_cream evaluate compare "${runs[@]}" --output "$WORK/compare/$task"
done
