# SPDX-License-Identifier: Apache-2.0
"""Imported once by the fork server, so that every rank starts with megatron in memory."""

from argparse import ArgumentParser

from megatron_cream.mcore import cpu

cpu.install()

import megatron.training  # noqa: E402, F401
from megatron.core.tokenizers import text  # noqa: E402, F401  (megatron imports it late)
from megatron.training import arguments  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402, F401  (megatron's tokenizers import it late)

import megatron_cream.mcore.hooks  # noqa: E402, F401
import megatron_cream.pretrain  # noqa: E402, F401
import megatron_cream.training.datasets  # noqa: E402, F401
import megatron_cream.training.step  # noqa: E402, F401
import megatron_cream.training.validate  # noqa: E402, F401

_read_docstrings = ArgumentGroupFactory._get_field_docstrings
_known: dict[type, dict[str, str]] = {}


def _remembered(self, config):
    """Each parser of Megatron's reads the source of forty classes for their help: half a second."""
    if config not in _known:
        _known[config] = _read_docstrings(self, config)
    return _known[config]


ArgumentGroupFactory._get_field_docstrings = _remembered
arguments.add_megatron_arguments(ArgumentParser())
