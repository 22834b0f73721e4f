# SPDX-License-Identifier: Apache-2.0
"""Imported once by the fork server, so that every rank starts with megatron in memory."""

from megatron_cream.mcore import cpu

cpu.install()

import megatron.training  # noqa: E402, F401
from transformers import AutoTokenizer  # noqa: E402, F401  (megatron's tokenizers import it late)

import megatron_cream.mcore.hooks  # noqa: E402, F401
import megatron_cream.training.datasets  # noqa: E402, F401
import megatron_cream.training.step  # noqa: E402, F401
import megatron_cream.training.validate  # noqa: E402, F401
