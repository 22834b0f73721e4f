# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# How torchrun's processes find each other on one node; megatron_cream/torchrun.py is the same for
# Python. They meet at the loopback address: --standalone asks for the address of the host's own
# name, which image builds, laptops and chroots often cannot resolve, and then waits for minutes.

# Sets LAUNCH_ARGS to torchrun's flags for so many processes on this node.
launch_on_one_node() {
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    # shellcheck disable=SC2034  # for the script that sources this file
    LAUNCH_ARGS=(
        --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1
        --nproc-per-node "$1"
    )
}
