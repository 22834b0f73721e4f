# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What run.sh and compare.sh must agree on, in tokens.
WINDOW=${WINDOW:-8192}
TARGET=${TARGET:-32768}
LENGTHS=${LENGTHS:-4K 8K 16K 32K}
DOCUMENTS=${DOCUMENTS:-8}
