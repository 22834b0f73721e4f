#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# megatron-cream extend, small: a random model of 0.1 M parameters from 64 to 256 tokens, on this
# repository's docs and two CPU cores. Every step is the real one; the model says nothing afterwards.
#
#   examples/quickstart/smoke.sh
#   WORK=/elsewhere examples/quickstart/smoke.sh --position-strategy pose    # flags of extend
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}
WORK=${WORK:-runs/smoke}
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"

[ -d "$WORK/tiny" ] ||
    "$PYTHON" "$HERE/examples/quickstart/tiny_model.py" --output "$WORK/tiny" --text "$HERE/docs"

# 64 tokens are too few for a document with questions: no retrieval documents.
exec "$PYTHON" -m megatron_cream extend --hf "$WORK/tiny" --text "$HERE/docs" \
    --held-out "$HERE/README.md" --target-length 256 --cpu --gpus 2 \
    --steps 6 --global-batch-size 4 --micro-batch-size 2 --lr 1e-3 --retrieval-share 0 \
    --tasks perplexity --output "$WORK/extended" "$@"
