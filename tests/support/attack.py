# SPDX-License-Identifier: Apache-2.0
"""How large the attacks of ``tests/attack`` are, and what they draw: one set of variables for all.

``MEGATRON_CREAM_ATTACK_ROUNDS`` damages per test, in place of a file's own number;
``MEGATRON_CREAM_ATTACK_KILLS`` kills per test that kills;
``MEGATRON_CREAM_ATTACK_SEED`` another seed draws other damages.
"""

import os


def rounds(usual: int) -> int:
    return int(os.environ.get("MEGATRON_CREAM_ATTACK_ROUNDS", usual))


def kills(usual: int) -> int:
    return int(os.environ.get("MEGATRON_CREAM_ATTACK_KILLS", usual))


SEED = int(os.environ.get("MEGATRON_CREAM_ATTACK_SEED", "0"))
