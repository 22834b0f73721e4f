# SPDX-License-Identifier: Apache-2.0
"""lm-eval's requests on a Megatron checkpoint give transformers' log-likelihoods."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: megatron_cream[lm-eval]")


@pytest.mark.usefixtures("cpu_megatron")
def test_log_likelihoods(small_hf, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_cream.checkpoint.importing import import_checkpoint
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
    with pytest.raises(NotImplementedError, match="has no generation: export"):
        model.generate_until([request])
