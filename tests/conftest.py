# SPDX-License-Identifier: Apache-2.0
import contextlib
import os
import warnings

# Two workers with a thread per core each would wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from support import ranks
from support.runs import FLAGS, write_dataset

# What megatron says on import about GPU packages that a CPU machine lacks.
warnings.filterwarnings("ignore", module=r"megatron\.")


# Folders whose files run the real trainer or commands.
_LONG = ("examples", "training", "checkpoint", "planning")


def pytest_collection_modifyitems(items):
    """Long files come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Have the workers of pytest-xdist start with megatron in memory, forks of one server."""
    options = session.config.option
    if getattr(options, "dist", "no") == "no" or set(options.tx) != {"popen"}:
        return
    os.environ.pop("PYTHON", None)  # make's: the stand-in would take it for its own name
    started = contextlib.ExitStack()
    program = started.enter_context(ranks.python())
    session.config.add_cleanup(started.close)
    options.tx = [f"popen//python={program}"] * len(options.tx)


@pytest.fixture(scope="session")
def cpu_megatron():
    """Megatron importable in this process with the CPU standing in for the GPU."""
    import support.preload  # noqa: F401


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


@pytest.fixture(scope="session")
def quick_python():
    """Path of a stand-in for python that starts with megatron in memory."""
    with ranks.python() as program:
        yield program
