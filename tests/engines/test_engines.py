# SPDX-License-Identifier: Apache-2.0
"""Inference engines against the angles that a model was trained with, and against our table.

``make test-engines`` installs them under build/engines (or ENGINES) and runs this.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from support import hf_models as models

from megatron_cream.checkpoint.hf_writer import ENGINES, IGNORED, REFUSED, YES
from megatron_cream.rope import hf_rope_fields, make_scaling
from megatron_cream.rope.huggingface import with_rope

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
INSTALLED = Path(os.environ.get("ENGINES", HERE.parents[1] / "build" / "engines"))
ORIGINAL, TARGET, DIM, THETA = 64, 256, 16, 20000.0
PAIRS = np.arange(DIM // 2)
LISTS = {"short_factor": list(1 + PAIRS / 16), "long_factor": list(1.5 + PAIRS / 2)}
KINDS = {
    **{name: {} for name in ("none", "linear", "ntk", "yarn", "yarn-pose", "llama3")},
    "longrope": LISTS,
    "proportional": {"partial_rotary_factor": 0.5},
}
SCRIPTS = {
    "transformers 5": ("run_transformers.py", "transformers-highest"),
    "transformers 4.57": ("run_transformers.py", "transformers-lowest"),
    "llama.cpp": ("run_llama_cpp.py", "llama-cpp-python"),
    "CTranslate2": ("run_ctranslate2.py", "ctranslate2"),
}
NEAR, FAR = 1e-4, 0.1
"""Largest difference of a logit (of about 3) that is none, and the least that is one."""


def scaling(kind):
    factor = 1.0 if kind == "none" else TARGET / ORIGINAL
    options = {"dim": DIM, "base": THETA, "original_length": ORIGINAL, "factor": factor}
    return make_scaling(kind, **options, **KINDS[kind])


class Ours(torch.nn.Module):
    """Cosines and sines as this package computes them, in float64."""

    def __init__(self, kind):
        super().__init__()
        self.scaling = scaling(kind)

    def forward(self, _, position_ids):
        served = self.scaling.at_length(position_ids.shape[1])
        angles = position_ids[..., None].double() * torch.from_numpy(served.inv_freq)
        angles = angles.repeat(1, 1, 2)
        return tuple((x * served.attention_factor).float() for x in (angles.cos(), angles.sin()))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with one export a kind, and token ids below and beyond the original window."""
    folder = tmp_path_factory.mktemp("exports")
    small = {"num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": ORIGINAL}
    base = models.make(folder / "base", **small)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(3000)]
    (folder / "text").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(base / "tokenizer"),
        model_type="bpe",
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = json.loads((base / "config.json").read_text())
    for kind in KINDS:
        shutil.copytree(base, folder / kind)
        fields = hf_rope_fields(scaling(kind), ORIGINAL if kind == "none" else TARGET)
        (folder / kind / "config.json").write_text(json.dumps(with_rope(config, fields)))
    ids = {name: rng.integers(3, 200, size) for name, size in (("short", 48), ("long", TARGET))}
    np.savez(folder / "ids.npz", **ids)
    return folder


@pytest.fixture(scope="module")
def trained(exports):
    """Logits ``[s, v]`` with our angles, by kind and sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        exports / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = {}
    for kind in KINDS:
        model.model.rotary_emb = Ours(kind)
        with torch.no_grad():
            found[kind] = {
                name: model(torch.from_numpy(ids)[None]).logits[0].numpy()
                for name, ids in np.load(exports / "ids.npz").items()
            }
    return found


@pytest.fixture(scope="module", params=SCRIPTS)
def answers(request, exports):
    """Engine, and what it wrote for every kind."""
    script, package = SCRIPTS[request.param]
    if not (INSTALLED / package).is_dir():
        pytest.skip(f"{request.param} is not in {INSTALLED}: make test-engines installs it")
    out = exports / package
    out.mkdir()
    path = {"PYTHONPATH": str(INSTALLED / package), "LLAMA_CPP": str(INSTALLED / "llama.cpp")}
    folders = [str(exports / kind) for kind in KINDS]
    command = [sys.executable, str(HERE / script), str(out), str(exports / "ids.npz"), *folders]
    ended = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    print(f"\n{request.param}: version {(out / 'version.txt').read_text()}")
    return request.param, out


@pytest.mark.parametrize("kind", KINDS)
def test_engine_does_what_the_table_says(answers, trained, kind):
    name, out = answers
    (engine,) = (engine for engine in ENGINES if engine.name == name)
    expected = engine.of(scaling(kind).to_hf()["rope_type"])
    assert engine.known == "run"
    refusal = out / f"{kind}.json"
    if refusal.is_file():
        print(f"{name}, {kind}: refused: {json.loads(refusal.read_text())['refused'][:100]}")
        assert expected == REFUSED
        return
    found = np.load(out / f"{kind}.npz")
    apart = {key: float(np.abs(found[key] - value).max()) for key, value in trained[kind].items()}
    print(f"{name}, {kind}: largest difference of a logit {apart}")
    if expected == YES:
        assert max(apart.values()) < NEAR
    else:
        assert expected == IGNORED
        assert apart["long"] > FAR


def test_kinds_are_told_apart(trained):
    """Each interpolation gives other logits than plain RoPE, so that to ignore it shows."""
    for kind in KINDS.keys() - {"none"}:
        for name, plain in trained["none"].items():
            assert np.abs(trained[kind][name] - plain).max() > FAR
