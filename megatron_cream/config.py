# SPDX-License-Identifier: Apache-2.0
"""The settings of a context extension: one dataclass behind flags, checkpoints and exports."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from megatron_cream import __version__
from megatron_cream.errors import UserError
from megatron_cream.options import flag_name
from megatron_cream.positions import STRATEGIES, Strategy, make_strategy
from megatron_cream.positions.mixtures import PlainShare, ScalePerSample, validate_share
from megatron_cream.positions.strategy import strategy_class
from megatron_cream.rope import SCALINGS, RopeScaling, compose, make_scaling
from megatron_cream.rope.lists import mix_windows
from megatron_cream.rope.scaling import scaling_class

SETTINGS_KEY = "megatron_cream"
"""Attribute of Megatron's arguments, saved with a checkpoint, that holds our settings."""

LABEL_RULES = ("true-next", "masked", "reference")
SAMPLE_UNITS = ("document", "window", "packed", "packed-documents")
DEFAULT_UNIT = "window"


@dataclass(frozen=True)
class ExtensionConfig:
    """Everything that decides positions, angles and labels of a run.

    A field's name with dashes is its flag, except ``train_length``, which is Megatron's
    --seq-length, ``position_options``, ``rotary_base`` and ``rope_base``. Lengths are in tokens.

    Attributes:
        train_length: N, tokens in a sample.
        target_length: T, the window to reach.
        original_length: window of the model before, from which RoPE is interpolated.
        position_strategy: a name of ``STRATEGIES`` of ``megatron_cream.positions``.
        position_seed: seed of the positions.
        position_options: settings of ``position_strategy`` alone, by the names of its fields; in a
            checkpoint and as flags they begin with the strategy's name, ``cream_sigma``.
        plain_share: probability that a training sample has plain positions instead.
        mixed_windows: whether samples (packed documents) whose positions all lie within
            ``original_length`` turn by the model's own RoPE, and only the others by the
            interpolation; see ``mix_windows``.
        rope_interpolation: a name of ``SCALINGS`` of ``megatron_cream.rope``.
        rope_factor: how many times longer RoPE becomes; T / original_length unless given.
        rotary_base: theta of the model before.
        rope_theta: theta that takes its place, if any.
        rope_options: settings of ``rope_interpolation`` alone, by their names in config.json.
        rope_base: settings of the scaling that the base model has already (--rope-base-config), on
            top of which it is interpolated; arguments of ``make_scaling``.
        label_rule: ``true-next`` (the token that follows in the text, also at chunk borders),
            ``masked`` (no loss where the next chunk is not the next text) or ``reference`` (the
            next token of the sample, as the published code trains it).
        sample_unit: ``document`` (one document per sample, as in the papers), ``window`` (documents
            cut into windows of T, what --sample-unit is unless given), ``packed`` (windows of T
            over all documents in a row) or ``packed-documents`` (several documents per sample, each
            at a layout of its own).
    """

    train_length: int
    target_length: int
    original_length: int
    position_strategy: str = "full"
    position_seed: int = 1234
    rope_interpolation: str = "none"
    rope_factor: float = 1.0
    rotary_base: float = 10000.0
    rope_theta: float | None = None
    rope_options: dict[str, Any] = field(default_factory=dict, hash=False)
    rope_base: dict[str, Any] | None = field(default=None, hash=False)
    label_rule: str = "true-next"
    sample_unit: str = "document"
    plain_share: float = 0.0
    mixed_windows: bool = False
    position_options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.label_rule not in LABEL_RULES:
            raise UserError(
                f"label_rule (--label-rule) is {self.label_rule!r}: it must be one of {LABEL_RULES}"
            )
        if self.sample_unit not in SAMPLE_UNITS:
            raise UserError(
                f"sample_unit (--sample-unit) is {self.sample_unit!r}: it must be one of "
                f"{SAMPLE_UNITS}"
            )
        complete = _complete(strategy_class(self.position_strategy), self.position_options)
        object.__setattr__(self, "position_options", complete)
        validate_share(self.plain_share)
        self._check_scales()
        self._check_mixed()
        self.strategy()
        self._check_theta()
        self.scaling(self._checked_dim())

    def strategy(self) -> Strategy:
        """Return the position strategy of training samples; one that draws scales if RoPE does."""
        given = self.position_options
        if self.plain_share:
            return PlainShare(
                self.train_length,
                self.target_length,
                plain_share=self.plain_share,
                inner=self.position_strategy,
                options=tuple(given.items()),
            )
        if not self.draws_scales:
            return make_strategy(
                self.position_strategy, self.train_length, self.target_length, **given
            )
        every, window = self.scaling(self._checked_dim()).scales, self.original_length
        fitting = tuple(t for t in every if t * window >= self.train_length)
        return self._scaled(self.position_strategy, fitting, given)

    def plain_strategy(self) -> Strategy:
        """Return the strategy of validation samples: plain positions."""
        if not self.draws_scales:
            return make_strategy("full", self.train_length, self.target_length)
        scale = self.scaling(self._checked_dim()).scale_of(self.train_length)
        return self._scaled("full", (scale,), {})

    @property
    def draws_scales(self) -> bool:
        """Whether each sample has a scale of its own, which its angles depend on."""
        return self._method.draws_scales

    @property
    def trained(self) -> bool:
        """Whether the frequencies of RoPE are weights of the model."""
        return bool(self._method.trained_by)

    @property
    def _method(self) -> type[RopeScaling]:
        return scaling_class(self.rope_interpolation)

    def _scaled(self, inner: str, scales: tuple[float, ...], options: dict[str, Any]) -> Strategy:
        return ScalePerSample(
            self.train_length,
            self.target_length,
            original_length=self.original_length,
            scales=scales,
            inner=inner,
            options=tuple(options.items()),
        )

    def scaling(self, dim: int) -> RopeScaling:
        """Return the RoPE of sequences of T tokens, for ``dim`` rotated dimensions.

        With mixed windows ``at_length`` of it is that of shorter ones.
        """
        scaling = self._interpolated(dim)
        if self.mixed_windows:
            scaling = mix_windows(self._own_scaling(dim), scaling)
        return scaling.at_length(self.target_length)

    def describe_rope(self, dim: int) -> str:
        """Return one line for a person."""
        summary = self._interpolated(dim).summary
        if not self.mixed_windows:
            return summary
        return f"{summary}; within {self.original_length} tokens the model's own (mixed windows)"

    def _interpolated(self, dim: int) -> RopeScaling:
        scaling = make_scaling(
            self.rope_interpolation,
            dim=dim,
            base=self.rotary_base if self.rope_theta is None else self.rope_theta,
            factor=self.rope_factor,
            original_length=self.original_length,
            **self.rope_options,
        )
        return scaling if self.rope_base is None else compose(self._own_scaling(dim), scaling)

    def _own_scaling(self, dim: int) -> RopeScaling:
        """Return the RoPE of the model before."""
        plain = {"name": "none", "base": self.rotary_base, "original_length": self.original_length}
        return make_scaling(dim=dim, **(plain if self.rope_base is None else self.rope_base))

    def _check_scales(self) -> None:
        if not self.draws_scales:
            return
        if self.plain_share:
            raise UserError(
                f"plain_share (--plain-share) is {self.plain_share:g}: --rope-interpolation "
                f"{self.rope_interpolation} has plain samples of its own, those of scale 1; it "
                "must be 0"
            )
        reached = self.target_length / self.original_length
        if reached <= 1 or self.rope_factor != reached:
            raise UserError(
                f"rope_factor (--rope-factor) is {self.rope_factor:g}: --rope-interpolation "
                f"{self.rope_interpolation} draws scales up to --target-length / --original-length "
                f"= {reached:g}, it must be that, and more than 1"
            )
        if self.sample_unit == "packed-documents":
            raise UserError(
                "sample_unit (--sample-unit) is 'packed-documents': --rope-interpolation "
                f"{self.rope_interpolation} has one scale per sample; it must be one of "
                "'document', 'window', 'packed'"
            )

    def _check_mixed(self) -> None:
        if self.mixed_windows and not self._method.mixes:
            able = ", ".join(name for name, cls in SCALINGS.items() if cls.mixes)
            raise UserError(
                "mixed_windows (--mixed-windows) is given: --rope-interpolation "
                f"{self.rope_interpolation} has no fixed frequencies beside the model's own; it "
                f"must be one of {able}"
            )

    def _check_theta(self) -> None:
        if self._method.needs_theta and self.rope_theta is None:
            raise UserError(
                f"rope_theta (--rope-theta) is missing: --rope-interpolation "
                f"{self.rope_interpolation} needs the new theta"
            )
        if self.rope_theta is not None and self.rope_interpolation == "none":
            raise UserError(
                f"rope_theta (--rope-theta) is {self.rope_theta:g}: with --rope-interpolation none "
                "the model keeps its own; leave it out, or use --rope-interpolation rope-theta"
            )

    def _checked_dim(self) -> int:
        """Any dimension checks all values but lists of one per pair, which are of one dimension."""
        for settings in (self.rope_options, self.rope_base or {}):
            lists = [value for value in settings.values() if isinstance(value, list | tuple)]
            if lists and len(lists[-1]) > 1:
                return 2 * len(lists[-1])
        return 64

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint or a JSON file, every strategy's options in them."""
        values = dataclasses.asdict(self)
        own = values.pop("position_options")
        for name, cls in STRATEGIES.items():
            given = own if name == self.position_strategy else {}
            options = _complete(cls, given)
            values |= {cls.setting(option): value for option, value in options.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExtensionConfig:
        """Inverse of ``to_dict``; settings that a newer version added keep their defaults.

        Raises:
            UserError: a setting that this version does not have.
        """
        left, own = dict(values), dict(values.get("position_options", {}))
        for name, strategy in STRATEGIES.items():
            named = {option: strategy.setting(option) for option in strategy.declared()}
            found = {option: left.pop(key) for option, key in named.items() if key in left}
            if name == values.get("position_strategy", cls.position_strategy):
                own |= found
        unknown = sorted(left.keys() - {one.name for one in dataclasses.fields(cls)})
        if unknown:
            raise UserError(
                f"the checkpoint's settings have {', '.join(unknown)}: megatron_cream "
                f"{__version__} does not know that; it must be read by the version that wrote it, "
                "or a later one"
            )
        return cls(**left | {"position_options": own})

    def differences(self, other: ExtensionConfig) -> list[str]:
        """Name each setting that differs, with both values, this one's first."""
        own, others = self.to_dict(), other.to_dict()
        return [
            f"{_FLAGS.get(name, flag_name(name))} {own[name]} != {others[name]}"
            for name in own
            if own[name] != others[name]
        ]


def _complete(cls: type[Strategy], given: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a strategy, those that are not given by their defaults."""
    given = {name: value for name, value in given.items() if value is not None}
    complete = {name: declared.default for name, declared in cls.declared().items()} | given
    return {name: tuple(v) if isinstance(v, list) else v for name, v in complete.items()}


def rope_settings(scaling: RopeScaling) -> dict[str, Any]:
    """Return the fields of ``ExtensionConfig`` that make ``scaling``, an imported model's say."""
    settings = scaling.settings()
    return {
        "rope_interpolation": settings.pop("name"),
        "rotary_base": settings.pop("base"),
        "rope_factor": settings.pop("factor"),
        "original_length": settings.pop("original_length"),
        "rope_options": settings,
    } | ({"rope_theta": scaling.base} if scaling.needs_theta else {})


_FLAGS = {"train_length": "--seq-length", "rope_base": "--rope-base-config"}


def saved_extension(args: Namespace) -> ExtensionConfig | None:
    """Return the settings in saved arguments, or None where another tool trained."""
    settings = getattr(args, SETTINGS_KEY, None)
    return None if settings is None else ExtensionConfig.from_dict(settings)


def extension_of(args: Namespace) -> ExtensionConfig:
    """Return the settings in the arguments of this run, which has them: made once, not per call.

    Arguments hold plain values, which Megatron writes into every checkpoint.
    """
    settings = getattr(args, SETTINGS_KEY)
    if not _made or _made[0][0] is not settings:
        _made[:] = [(settings, ExtensionConfig.from_dict(settings))]
    return _made[0][1]


_made: list[tuple[dict[str, Any], ExtensionConfig]] = []  # of the last that was asked for
