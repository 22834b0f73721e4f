# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
from support.runs import FLAGS


@pytest.fixture
def refused(monkeypatch, capsys, dataset):
    """Runs the command and returns its error line; fails if anything was started."""
    import torch

    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    def call(*extra, data=dataset):
        argv = ["pretrain", *cpu_flags(), "--cpu", *FLAGS, "--data-path", str(data), *extra]
        monkeypatch.setattr(sys, "argv", argv)
        before = torch.distributed.is_initialized()  # other tests of this process may have
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            pretrain.prepare()
        assert torch.distributed.is_initialized() == before
        assert "arguments" not in capsys.readouterr().out, "Megatron printed its arguments first"
        assert "\n" not in str(error.value)
        return str(error.value)

    return call
