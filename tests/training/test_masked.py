# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient where tokens are masked, by rule or by a mask beside the dataset.

Against a plain loop that knows nothing of layouts.

Samples of one step have very different numbers of trained tokens here, so dividing by another
number, or averaging averages, is seen.
"""

import json

import numpy as np
import pytest
import torch
from support import ranks
from support.runs import FLAGS

pytestmark = pytest.mark.usefixtures("cpu_megatron")

EOD, VOCABULARY, BATCH = 0, 128, 4
TRAINED = 32
MASKED = [
    *("--vocab-size", str(VOCABULARY), "--make-vocab-size-divisible-by", "1"),
    *("--label-rule", "masked", "--eod-mask-loss", "--split", "100,0,0", "--eval-iters", "0"),
    *("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--weight-decay", "0"),
    *("--sample-unit", "document"),  # the last token of a sample has no label
]
LAYOUTS = {
    "one rank": (1, []),
    "micro-batch 4": (1, ["--micro-batch-size", "4"]),
    "DP2": (2, []),
}


def write(prefix, documents, mask=None):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    note = {
        "vocab_size": VOCABULARY,
        "tokenizer_type": "test",
        "tokenizer_model": None,
        "eod_id": EOD,
        "bos_id": None,
        "appended_eod": True,
        "prepended_bos": False,
        "dropped": {},
    }
    if mask is not None:
        prefix.with_suffix(".mask").write_bytes(mask.astype(np.uint8).tobytes())
        note |= {"mask_bytes": len(mask), "trained_tokens": int(mask.sum())}
    prefix.with_suffix(".json").write_text(json.dumps(note))
    return str(prefix)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset in which the n-th document is an end of document every 2 to 40 tokens."""
    rng, documents = np.random.default_rng(3), []
    for share in (0.5, 0.02, 0.3, 0.1, 0.4, 0.03):
        document = rng.integers(1, VOCABULARY, size=900)
        document[rng.random(900) < share] = EOD
        documents.append(document)
    return write(tmp_path_factory.mktemp("masked") / "text", documents)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A dataset whose tokens below TRAINED have a loss; half of its documents have none such."""
    rng = np.random.default_rng(5)
    least = (1, TRAINED, 1, TRAINED, TRAINED, 1)
    documents = [rng.integers(first, VOCABULARY, size=900) for first in least]
    mask = np.concatenate(documents) < TRAINED
    return write(tmp_path_factory.mktemp("answers") / "text", documents, mask)


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """Runs of one step at each layout, from one checkpoint, that change no weight."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, *MASKED, "--data-path", texts]
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "1"]
    found = {"one rank": ranks.train(folder / "a", [*flags, *save])}
    start = ["--pretrained-checkpoint", str(folder / "checkpoint")]
    for name, (count, layout) in list(LAYOUTS.items())[1:]:
        found[name] = ranks.train(folder / name.replace(" ", "-"), [*flags, *start, *layout], count)
    return found, str(folder / "checkpoint")


@pytest.fixture(scope="module")
def reference(runs, texts):
    return by_a_plain_loop(runs[1], texts, lambda tokens, labels: tokens != EOD)


def by_a_plain_loop(checkpoint, texts, trained):
    """Loss and norm of the gradient of the first step, by a plain loop over its samples."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_cream.checkpoint.loading import load_model
    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig

    loaded = load_model(checkpoint)
    config = SpanDatasetConfig(
        random_seed=1234,
        sequence_length=96,
        blend=([texts], None),
        split="100,0,0",
        extension=loaded.extension,
    )
    source = IndexedDataset(texts, multimodal=False)
    samples = SpanDataset(source, texts, np.arange(6, dtype=np.int32), BATCH, Split.train, config)
    total, counts = torch.zeros(()), []
    for index in range(BATCH):
        sample = samples[index]
        tokens, positions = sample["tokens"][None], sample["position_ids"][None]
        logits = loaded.module(tokens, positions, None)[0]
        borders = torch.diff(positions[0], append=positions[0, -1:]) != 1  # also the last
        counted = trained(tokens[0], sample["labels"]) & ~borders
        losses = -torch.log_softmax(logits.float(), -1)
        total = total + losses[torch.arange(96), sample["labels"]][counted].sum()
        counts.append(int(counted.sum()))
    loss = total / sum(counts)
    loss.backward()
    gradients = [p.grad for p in loaded.module.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    return float(loss.detach()), float(norm), counts


def test_samples_have_different_numbers_of_trained_tokens(reference):
    counts = reference[2]
    assert max(counts) > 1.5 * min(counts) and sum(counts) < BATCH * 96


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_are_those_of_a_plain_loop(name, runs, reference):
    loss, norm, _ = reference
    run = runs[0][name]
    assert run.losses[1] == pytest.approx(loss, rel=1e-5)
    assert run.norms[1] == pytest.approx(norm, rel=1e-4)


MASK_LAYOUTS = {"one rank": (1, []), "one sample per rank": (4, [])}


@pytest.mark.parametrize("name", MASK_LAYOUTS)
def test_a_mask_beside_the_dataset_is_that_of_a_plain_loop(name, runs, answers, tmp_path):
    def trained(tokens, labels):
        return labels < TRAINED

    loss, norm, counts = by_a_plain_loop(runs[1], answers, trained)
    assert 0 in counts and max(counts) > 10  # a rank that trains nothing, and one that does
    count, layout = MASK_LAYOUTS[name]
    start = ["--data-path", answers, "--pretrained-checkpoint", runs[1]]
    run = ranks.train(tmp_path, [*FLAGS, *MASKED, *start, *layout], count)
    assert run.losses[1] == pytest.approx(loss, rel=1e-5)
    assert run.norms[1] == pytest.approx(norm, rel=1e-4)
    assert run.lines("loss on 12.") and run.lines(f"% of the tokens of {answers}")


def test_a_step_that_trains_nothing_has_loss_0(runs, tmp_path):
    """Also in validation: the one trained token is the first of its document, and no label."""
    documents = [np.random.default_rng(6).integers(1, VOCABULARY, size=900)] * 6
    mask = np.arange(6 * 900) == 0
    prefix = write(tmp_path / "text", documents, mask)
    flags = [*FLAGS, *MASKED, "--data-path", prefix, "--pretrained-checkpoint", runs[1]]
    own = ["--split", "50,50,0", "--eval-iters", "1", "--eval-interval", "1", "--train-iters", "2"]
    run = ranks.train(tmp_path / "run", [*flags, *own], 2)
    assert run.losses == {1: 0.0, 2: 0.0} and run.norms == {1: 0.0, 2: 0.0}
    assert "nan" not in run.log.lower().replace("number of nan iterations", "").replace(
        "nan_in", ""
    )
    assert run.lines("validation loss at iteration 1")
