# SPDX-License-Identifier: Apache-2.0
"""A new strategy or interpolation touches one class: flags, checks, checkpoint, export follow."""

import argparse
import json
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.options import Option
from megatron_cream.positions import STRATEGIES, SampleLayout, Strategy, coverage
from megatron_cream.positions.strategy import ChunkLayout, option
from megatron_cream.rope import SCALINGS, RopeScaling, hf_rope_fields, scaling_from_hf
from megatron_cream.rope.huggingface import with_rope
from megatron_cream.training.arguments import add_arguments, extension_from_args

MODEL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}


class ToyLayout(ChunkLayout):
    def _spans(self, document_length):
        return [(0, self.train_length)]


@pytest.fixture
def toy_strategy():
    @dataclass(frozen=True)
    class Shifted(Strategy, name="toy-shift"):
        """All tokens moved right together by up to ``most``."""

        most: int = option("largest shift in tokens", default=64, type=int)
        side: str = option("where", default="left", type=str, choices=("left", "right"))

        def layout(self, seed: int, index: int) -> SampleLayout:
            start = (seed + index) % (min(self.most, self.target_length - self.train_length) + 1)
            chunks = ((start, self.train_length),)
            return ToyLayout(self.train_length, self.target_length, chunks)

    yield Shifted
    del STRATEGIES["toy-shift"]


@pytest.fixture
def toy_scaling():
    class Halved(RopeScaling, name="toy-halved"):
        """The slower half of the pairs divided by s, times ``extra``."""

        OPTIONS = {"extra": Option("more division", default=1.0)}
        hf_types = ("toy",)
        hf_required = ("factor", "extra")

        @property
        def divisors(self):
            slow = np.arange(self.dim // 2) >= self.dim // 4
            return np.where(slow, self.factor * self.option("extra"), 1.0)

        def to_hf(self):
            return {
                "rope_type": "toy",
                "rope_theta": self.theta,
                "factor": self.factor,
                "extra": self.option("extra"),
            }

    yield Halved
    del SCALINGS["toy-halved"]


def parse(*flags):
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rotary-base", type=int, default=10000)
    parser.set_defaults(seed=1, hidden_size=256, num_attention_heads=4, kv_channels=64)
    parser.set_defaults(rotary_percent=1.0)
    return parser.parse_args(["--target-length", "2048", *flags])


STRATEGY = ("--position-strategy", "toy-shift", "--toy-shift-most", "100")
SCALING = ("--rope-interpolation", "toy-halved", "--rope-options", "extra=2")


def test_both_are_trained_saved_and_read_again(toy_strategy, toy_scaling):
    made = extension_from_args(parse(*STRATEGY, *SCALING))
    assert made.strategy() == toy_strategy(256, 2048, most=100, side="left")
    assert made.strategy().layout(0, 7).position_ids.tolist() == list(range(7, 263))
    assert coverage(made.strategy(), 10).sample_counts[255] == 10
    saved = json.loads(json.dumps(made.to_dict()))
    assert saved["toy_shift_most"] == 100 and saved["cream_sigma"] == 3.0
    assert ExtensionConfig.from_dict(saved) == made
    other = extension_from_args(parse(*STRATEGY, "--toy-shift-side", "right", *SCALING))
    assert made.differences(other) == ["--toy-shift-side left != right"]


def test_a_plain_share_goes_with_it(toy_strategy):
    mixed = extension_from_args(parse(*STRATEGY, "--plain-share", "0.5")).strategy()
    assert mixed.strategy == toy_strategy(256, 2048, most=100)


def test_the_scaling_is_exported_and_read_again(toy_scaling):
    scaling = extension_from_args(parse(*SCALING)).scaling(64)
    assert scaling.divisors.tolist() == [1.0] * 16 + [16.0] * 16
    fields = json.loads(json.dumps(hf_rope_fields(scaling, 2048)))
    config = with_rope({**MODEL, "max_position_embeddings": 256}, fields)
    assert scaling_from_hf(config) == scaling.__class__(64, 1e4, 8.0, 256, {"extra": 2.0})
    del config["rope_parameters"]["extra"]
    with pytest.raises(UserError, match="'toy': it needs 'extra' beside it"):
        scaling_from_hf(config)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*SCALING[:3], "extra=-1"), "extra .--rope-options. is -1: it must be a positive number"),
        ((*SCALING[:3], "more=1"), "--rope-options has more: toy-halved takes extra"),
        (("--rope-base-config", "no.json", *SCALING), "no.json"),
    ],
)
def test_its_options_are_checked(toy_scaling, flags, words):
    with pytest.raises((UserError, FileNotFoundError), match=words):
        extension_from_args(parse(*flags))


def test_help_and_choices_follow(toy_strategy, toy_scaling):
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    assert "--toy-shift-most" in text and "largest shift in tokens (default: 64)" in text
    assert "toy-halved" in text
    with pytest.raises(UserError, match="--toy-shift-side: invalid choice: 'up'"):
        parse(*STRATEGY, "--toy-shift-side", "up")


def test_a_declared_choice_is_checked_in_python_too(toy_strategy):
    with pytest.raises(UserError, match="side .--toy-shift-side. is 'up': it must be one of"):
        toy_strategy(256, 2048, side="up")


def test_a_name_is_registered_once(toy_strategy, toy_scaling):
    with pytest.raises(ValueError, match="'toy-shift' is registered twice"):
        type("Again", (Strategy,), {}, name="toy-shift")
    with pytest.raises(ValueError, match="'toy-halved' is registered twice"):
        type("Again", (RopeScaling,), {}, name="toy-halved")
