# SPDX-License-Identifier: Apache-2.0
"""lm-eval's requests on a Megatron checkpoint give transformers' log-likelihoods."""

import importlib.util
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_cream.corpus.tokenizers import ByteLevelTokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation.forward import ScoringModel


@pytest.mark.usefixtures("cpu_megatron")
def test_log_likelihoods(small_hf, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: megatron_cream[lm-eval]")
    from transformers import AutoModelForCausalLM

    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.evaluation.lm_eval import MegatronCreamLM

    import_checkpoint(small_hf, str(tmp_path / "import"), quiet=True)
    model = MegatronCreamLM(str(tmp_path / "import"))
    request = SimpleNamespace(args=("What is the pass", " key?"))
    ((found, _),) = model.loglikelihood([request], disable_tqdm=True)
    context, wanted = model._encode_pair(*request.args)
    hf = AutoModelForCausalLM.from_pretrained(small_hf)
    with torch.inference_mode():
        logits = hf(torch.tensor([context + wanted])).logits[0].double().log_softmax(-1)
    count = len(wanted)
    rows = logits[-count - 1 : -1].gather(1, torch.tensor(wanted)[:, None])
    assert found == pytest.approx(rows.sum().item(), abs=1e-4)
    asked = SimpleNamespace(args=("What is the pass", {"max_gen_toks": 5}))
    (text,) = model.generate_until([asked], disable_tqdm=True)
    tokens = torch.tensor([model.tok_encode(asked.args[0])])
    made = hf.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert text == model.tokens.decode(made[0, tokens.shape[1] :].tolist())


@pytest.fixture
def lm(monkeypatch):
    """The module with a stand-in for what it takes from lm-eval where that is not installed."""
    name = "megatron_cream.evaluation.lm_eval"
    if importlib.util.find_spec("lm_eval") is not None:
        yield importlib.import_module(name)  # once: lm-eval keeps models by name
        return
    parts = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }
    for part, values in parts.items():
        module = ModuleType(part)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


class Writer(ScoringModel):
    """A model that goes on writing the same text, one byte at a time."""

    stop_tokens, primary = (), True

    def __init__(self, text):
        self.text, self.read = text.encode(), []

    def run(self, passes):
        for one in passes:
            self.read.append(one.tokens[0].tolist())
            best = self.text[(len(self.read) - 1) % len(self.text)]
            yield SimpleNamespace(best=torch.tensor([[best]]))


@pytest.fixture
def writer(lm):
    """The model class around a model that writes ``a blue sky, then Q: ...``."""
    model = lm.MegatronCreamLM.__new__(lm.MegatronCreamLM)
    model.model, model.tokens = Writer("a blue sky\n then Q: on"), ByteLevelTokenizer()
    model.max_length = 40
    return model


@pytest.mark.parametrize(
    ("how", "text", "passes"),
    [
        ({"until": ["Q:", "\n"], "max_gen_toks": 20}, "a blue sky", 11),
        ({"until": "sky", "max_gen_toks": 20}, "a blue ", 10),
        ({"until": [""], "max_gen_toks": 4}, "a bl", 4),
    ],
)
def test_generation_ends_before_what_stops_it(writer, how, text, passes):
    (found,) = writer.generate_until([SimpleNamespace(args=("x" * 90, how))], disable_tqdm=True)
    assert found == text and len(writer.model.read) == passes
    # The beginning of what is too long is cut.
    assert len(writer.model.read[0]) == 40 - how["max_gen_toks"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"do_sample": True, "temperature": 1.0}, "do_sample=True: megatron_cream decodes"),
        ({"max_gen_toks": 40}, "max_gen_toks is 40: it must be below max_length, 40"),
    ],
)
def test_generation_that_cannot_be_is_refused(writer, how, message):
    with pytest.raises(UserError, match=message):
        writer.generate_until([SimpleNamespace(args=("x", how))], disable_tqdm=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "checkpoint=None: it must be a folder"),
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere: it must be a folder"),
        ({"checkpoint": "RUN", "max_length": "long"}, "max_length=long: it must be a whole"),
        ({"checkpoint": "RUN", "tensor_parallel": 0}, "tensor_parallel=0: it must be a whole"),
        ({"checkpoint": "RUN"}, "cpu=true in --model_args is not given, and this machine has no"),
    ],
)
def test_what_model_args_lack_is_said(lm, tmp_path, monkeypatch, words, message):
    (tmp_path / "metadata.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {key: str(tmp_path) if value == "RUN" else value for key, value in words.items()}
    with pytest.raises(UserError, match=message):
        lm.MegatronCreamLM(**given)


def test_the_command_without_lm_eval_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("megatron_cream.evaluation.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    assert "error: this module needs lm-eval" in capsys.readouterr().err
