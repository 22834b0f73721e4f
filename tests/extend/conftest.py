# SPDX-License-Identifier: Apache-2.0
"""A small model with a tokenizer, to extend."""

import pytest
from support.evaluation import write_small_hf


@pytest.fixture(scope="session")
def small_hf(tmp_path_factory):
    """Folder of a random model of two layers whose vocabulary is larger than its tokenizer's."""
    return write_small_hf(tmp_path_factory.mktemp("hf"))
