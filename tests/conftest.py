# SPDX-License-Identifier: Apache-2.0
import warnings

import numpy as np
import pytest
from support import ranks
from support.runs import FLAGS, write_dataset

# What megatron says on import about GPU packages that a CPU machine lacks.
warnings.filterwarnings("ignore", module=r"megatron\.")


@pytest.fixture(scope="session")
def cpu_megatron():
    """Megatron importable in this process with the CPU standing in for the GPU."""
    from megatron_cream.mcore import cpu

    cpu.install()
    import megatron.training  # noqa: F401


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A dataset of 40 documents, some shorter than N, some longer than T."""
    lengths = np.random.default_rng(1).integers(50, 1500, size=40)
    return write_dataset(tmp_path_factory.mktemp("data") / "text", lengths)


@pytest.fixture(scope="session")
def flags(dataset):
    """Flags of a small run on ``dataset``."""
    return [*FLAGS, "--data-path", dataset]


@pytest.fixture(scope="session")
def initial(tmp_path_factory, flags):
    """Weights that every layout starts from: Megatron draws other ones at other layouts."""
    folder = tmp_path_factory.mktemp("initial")
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "1", "--train-iters", "1"]
    ranks.train(folder, [*flags, *save, "--eval-iters", "0"])
    return str(folder / "checkpoint")


@pytest.fixture(scope="session")
def reference(tmp_path_factory, flags, initial):
    """Ten iterations on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    return ranks.train(folder, [*flags, "--pretrained-checkpoint", initial])
