# SPDX-License-Identifier: Apache-2.0
"""--te-cross-entropy: what reaches Megatron's config, and which kernels are taken."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from support import forks, planning
from support.runs import FLAGS

from megatron_cream.extras import te_cross_entropy


@pytest.mark.parametrize(
    ("flags", "expected"), [([], (False, "native")), ([te_cross_entropy.FLAG], (True, "te"))]
)
def test_the_models_config(flags, expected):
    assert forks.call(planning.loss_kernel, [*FLAGS, *flags], 1) == expected


def of_2_18(inp, target, label_smoothing=0.0, is_cg_capturable=False):
    """Its arguments."""


def of_2_19(inp, target, label_smoothing=0.0, is_cg_capturable=False, *, overwrite_input=False):
    """Its arguments."""


def install(monkeypatch, kernel):
    names = ("transformer_engine", "transformer_engine.pytorch")
    for name in (*names, "transformer_engine.pytorch.cross_entropy"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["transformer_engine"].__version__ = "2.18.0"
    sys.modules[name].parallel_cross_entropy = kernel
    monkeypatch.setattr(te_cross_entropy, "find_spec", lambda name: object())


ARGS = SimpleNamespace(te_cross_entropy=True, cpu=False)


def test_kernels_by_what_they_can_do(monkeypatch):
    install(monkeypatch, of_2_19)
    te_cross_entropy.EXTRA.validate_machine(ARGS)
    install(monkeypatch, of_2_18)
    with pytest.raises(ValueError, match=r"^--te-cross-entropy is given: .* 2\.19 .*2\.18\.0 is"):
        te_cross_entropy.EXTRA.validate_machine(ARGS)
    te_cross_entropy.EXTRA.validate_machine(SimpleNamespace(te_cross_entropy=False, cpu=False))


def test_no_transformer_engine(monkeypatch):
    monkeypatch.setattr(te_cross_entropy, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--te-cross-entropy .* 2\.19 .* is not installed"):
        te_cross_entropy.EXTRA.validate_machine(ARGS)
