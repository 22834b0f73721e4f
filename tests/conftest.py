# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest

# What megatron says on import about GPU packages that a CPU machine lacks.
warnings.filterwarnings("ignore", module=r"megatron\.")


@pytest.fixture(scope="session")
def cpu_megatron():
    """Megatron importable in this process with the CPU standing in for the GPU."""
    from megatron_cream.training import cpu

    cpu.install()
    import megatron.training  # noqa: F401
