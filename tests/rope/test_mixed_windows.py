# SPDX-License-Identifier: Apache-2.0
"""Mixed windows: near samples turn as the model before, far ones as without them."""

import json
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.rope import SCALINGS, hf_rope_fields, make_scaling, scaling_from_hf

N, T, DIM = 96, 768, 64
MIXING = [name for name, cls in SCALINGS.items() if cls.mixes and name != "longrope"]


def extension(name="yarn", mixed=True, **changes):
    settings = {"rope_interpolation": name, "rope_factor": 8.0, "plain_share": 0.5}
    settings |= {"rope_theta": 5e5} if name == "rope-theta" else {}
    settings |= {"position_strategy": "cream", "mixed_windows": mixed}
    return ExtensionConfig(N, T, N, **settings | changes)


def float32(scaling):
    """Frequencies as a rotary makes them."""
    exponents = torch.arange(0, DIM, 2, dtype=torch.float32) / DIM
    return scaling.rounded((scaling.theta**exponents).numpy())


@pytest.mark.parametrize("name", MIXING)
def test_one_list_is_the_models_own_and_the_other_the_interpolations(name):
    mixed = extension(name).scaling(DIM)
    far = extension(name, mixed=False).scaling(DIM)
    near = make_scaling("none", dim=DIM, original_length=N)
    assert np.array_equal(float32(mixed.at_length(N)), float32(near))
    turning = far.inv_freq > 1e-20  # of a pair that stops a list has 1e-30
    np.testing.assert_allclose(float32(mixed)[turning], float32(far)[turning], rtol=5e-7)
    assert np.all(float32(mixed)[~turning] < 1e-20)
    assert mixed.attention_factor == 1.0


def test_the_attention_factor_is_one_for_both_and_can_be_named():
    assert extension("yarn", mixed=False).scaling(DIM).attention_factor > 1.2
    named = extension("yarn", rope_options={"attention_factor": 1.1}).scaling(DIM)
    assert named.attention_factor == named.at_length(N).attention_factor == 1.1
    deepseek = {"mscale": 1.0, "mscale_all_dim": 0.5}
    assert extension("yarn", rope_options=deepseek).scaling(DIM).attention_factor > 1.05


def test_a_scaled_base_keeps_its_own_scaling_and_factor():
    base = {"name": "yarn", "base": 1e4, "factor": 4.0, "original_length": N // 4}
    mixed = extension("linear", rope_base=base).scaling(DIM)
    own = make_scaling(**base, dim=DIM)
    np.testing.assert_allclose(mixed.at_length(N).inv_freq, own.inv_freq)
    np.testing.assert_allclose(mixed.inv_freq, own.inv_freq / 8)
    assert mixed.attention_factor == own.attention_factor != 1


def test_longrope_has_its_lists_and_its_factor():
    lists = {"short_factor": [1.0] * 32, "long_factor": [1.0 + i for i in range(32)]}
    ways = [extension("longrope", mixed, rope_options=lists) for mixed in (True, False)]
    assert ways[0].scaling(DIM) == ways[1].scaling(DIM)


@pytest.mark.parametrize("name", MIXING)
def test_config_json_has_both_lists_and_reads_back(name):
    mixed = extension(name).scaling(DIM)
    fields = json.loads(json.dumps(hf_rope_fields(mixed, T)))
    assert fields["rope_parameters"]["rope_type"] == "longrope"
    assert fields["rope_parameters"]["attention_factor"] == 1.0
    assert fields["original_max_position_embeddings"] == N
    config = {"hidden_size": 4 * DIM, "num_attention_heads": 4, **fields}
    read = scaling_from_hf(config)
    for length in (N, N + 1, T):
        assert np.array_equal(float32(read.at_length(length)), float32(mixed.at_length(length)))
    assert read.attention_factor == 1.0


@pytest.mark.parametrize("name", ["none", "dynamic", "clex"])
def test_what_has_no_list_of_its_own_is_refused(name):
    with pytest.raises(UserError, match=f"--mixed-windows.*{name} has no fixed.*one of .*yarn"):
        extension(name, plain_share=0.0)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--plain-share is 0 with --position-strategy cream"),
        (["--plain-share", "1"], "--plain-share is 1"),
        (["--plain-share", "0.5", "--position-strategy", "full"], "--position-strategy full"),
        (["--plain-share", "0.5", "--original-length", "48"], "--seq-length is 96"),
    ],
)
def test_a_window_that_is_never_trained_is_refused(flags, named):
    from megatron_cream.training.arguments import add_arguments, extension_from_args

    parser = add_arguments(ArgumentParser())
    parser.set_defaults(seq_length=N, rotary_base=10000, seed=1, hidden_size=None)
    given = ["--target-length", str(T), "--mixed-windows"]
    with pytest.raises(UserError, match=named):
        extension_from_args(parser.parse_args([*given, *flags]))
    packed = [*given, "--sample-unit", "packed-documents"]
    assert extension_from_args(parser.parse_args(packed)).mixed_windows


def test_settings_travel_and_are_compared():
    mixed = extension()
    assert ExtensionConfig.from_dict(mixed.to_dict()) == mixed
    assert mixed.differences(extension(mixed=False)) == ["--mixed-windows True != False"]
    older = {k: v for k, v in mixed.to_dict().items() if k != "mixed_windows"}
    assert not ExtensionConfig.from_dict(older).mixed_windows
    with pytest.raises(UserError, match=r"have scatter_pieces: megatron_cream \d.* does not"):
        ExtensionConfig.from_dict(mixed.to_dict() | {"scatter_pieces": 3})
    assert "the model's own (mixed windows)" in mixed.describe_rope(DIM)


@pytest.mark.usefixtures("cpu_megatron")
class TestRotary:
    def rotary(self, scaling, mixed=False):
        from megatron_cream.mcore.rotary import PositionRotaryEmbedding

        rotary = PositionRotaryEmbedding(scaling)
        if mixed:
            rotary.mix_windows()
        return rotary

    @pytest.mark.parametrize("packed", [False, True])
    def test_samples_of_one_batch_turn_each_as_in_its_own_run(self, packed):
        settings = extension()
        strategy = settings.strategy()
        layouts = [strategy.layout(1, i) for i in range(8)]
        plain = [strategy.is_plain(1, i) for i in range(8)]
        assert 0 < sum(plain) < 8
        ids = torch.stack([torch.from_numpy(layout.position_ids) for layout in layouts])
        far = ~torch.tensor(plain)[:, None].expand_as(ids)
        found = self.angles(self.rotary(settings.scaling(DIM), mixed=True), ids, far, packed)
        before = make_scaling("none", dim=DIM, original_length=N)
        own = self.rotary(before).angles(ids)
        alone = self.rotary(extension(mixed=False).scaling(DIM)).angles(ids)
        for i in range(8):
            if plain[i]:
                assert torch.equal(found[:, i], own[:, i])
            else:
                torch.testing.assert_close(found[:, i], alone[:, i], rtol=5e-7, atol=0)
                assert not torch.allclose(found[:, i], own[:, i])

    def angles(self, rotary, ids, far, packed):
        if not packed:
            rotary.set_position_ids(ids)
            rotary.set_far(far)
            return rotary(N)
        rotary.set_position_ids(ids.reshape(1, -1))
        rotary.set_far(far.reshape(1, -1))
        return rotary(ids.numel(), packed_seq=True).view(*ids.shape, 1, DIM).transpose(0, 1)

    def test_a_training_step_must_say_which_samples_are_far(self):
        rotary = self.rotary(extension().scaling(DIM), mixed=True)
        ids = torch.arange(N)[None]
        rotary.set_position_ids(ids)
        rotary.set_far(ids >= 0)
        rotary(N)
        rotary.set_position_ids(ids)
        with pytest.raises(RuntimeError, match="set_far"):
            rotary(N)  # those of the step before are not taken
        rotary.eval().set_length(N)
        rotary.set_position_ids(ids)
        own = self.rotary(make_scaling("none", dim=DIM, original_length=N))
        assert torch.equal(rotary(N), own.angles(ids))


@pytest.mark.usefixtures("cpu_megatron")
class TestMarks:
    @given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 9))
    def test_samples(self, far, length):
        from megatron_cream.training.step import mark_far, take_marks

        ids = torch.stack([torch.arange(length) + (1000 if one else 0) for one in far])
        marked = mark_far(ids, None, 1000)
        cut = marked[:, : (length + 1) // 2]  # a context-parallel rank's, without the last one
        back, found = take_marks(cut)
        assert torch.equal(back, ids[:, : cut.shape[1]])
        assert torch.equal(found, torch.tensor(far)[:, None].expand_as(cut))

    @given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 30)), min_size=1, max_size=6))
    def test_packed_documents(self, documents):
        from megatron_cream.training.step import mark_far, take_marks

        ids = torch.cat([torch.arange(size) + first for size, first in documents])[None]
        ends = np.cumsum([0, *(size for size, _ in documents)])
        boundaries = torch.from_numpy(ends.astype(np.int32))[None]
        back, found = take_marks(mark_far(ids, boundaries, 20))
        assert torch.equal(back, ids)
        wanted = [size + first > 20 for size, first in documents for _ in range(size)]
        assert found[0].tolist() == wanted
