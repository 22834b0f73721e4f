# SPDX-License-Identifier: Apache-2.0
"""Imported once by the fork server, so that every rank starts with megatron in memory.

Each rank would import what this leaves out.
"""

import contextlib
import gc
import importlib
import os
import pkgutil
from argparse import ArgumentParser

gc.disable()  # imports make objects that stay

from megatron_cream.mcore import cpu  # noqa: E402

cpu.install()

# What Megatron imports late.
import megatron.core.datasets.helpers_cpp  # noqa: E402, F401
import megatron.core.models.mimo  # noqa: E402, F401
import megatron.core.tokenizers.text.models  # noqa: E402, F401
import megatron.training  # noqa: E402, F401
import numpy.ma  # noqa: E402, F401
from megatron.training import arguments  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402, F401

import megatron_cream  # noqa: E402
from megatron_cream.errors import MissingPackageError  # noqa: E402

# Triton makes functions for its interpreter or for a GPU at their import: a fork decides which.
KERNELS = ("merge_kernel", "ode_triton", "rotation_kernel", "rotation_programs")

for module in pkgutil.walk_packages(megatron_cream.__path__, "megatron_cream."):
    if module.name.rpartition(".")[2] not in ("__main__", *KERNELS):
        with contextlib.suppress(MissingPackageError):
            importlib.import_module(module.name)

_read_docstrings = ArgumentGroupFactory._get_field_docstrings
_known: dict[type, dict[str, str]] = {}


def _remembered(self, config):
    """Each parser of Megatron's reads the source of forty classes for their help: half a second."""
    if config not in _known:
        _known[config] = _read_docstrings(self, config)
    return _known[config]


ArgumentGroupFactory._get_field_docstrings = _remembered
arguments.add_megatron_arguments(ArgumentParser())

gc.enable()
os.register_at_fork(after_in_child=gc.freeze)  # a fork's collections leave these objects alone
