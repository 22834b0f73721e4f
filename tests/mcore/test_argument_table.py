# SPDX-License-Identifier: Apache-2.0
"""The table of Megatron's arguments against the parser of the installed Megatron."""

from argparse import ArgumentParser, Namespace
from collections import Counter
from inspect import getsource

import pytest

from megatron_cream.errors import UserError
from megatron_cream.mcore import argument_table

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.fixture(scope="module")
def parser(cpu_megatron):
    from megatron.training.arguments import add_megatron_arguments

    from megatron_cream.training.arguments import add_arguments

    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


@pytest.fixture(scope="module")
def actions(parser):
    return {action.dest: action for action in parser._actions}


def rows():
    return pytest.mark.parametrize("row", argument_table._ROWS, ids=lambda row: row.name)


def test_no_argument_has_two_rows():
    assert [
        name for name, n in Counter(row.name for row in argument_table._ROWS).items() if n > 1
    ] == []


@rows()
def test_megatron_has_every_argument_by_its_flag(actions, row):
    if row.computed:
        from megatron.training.arguments import validate_args

        assert f"args.{row.name} =" in getsource(validate_args)
        return
    action = actions[row.name]
    assert (row.off or argument_table.flag_of(row.name)) in action.option_strings
    assert (action.const is False) == (row.off is not None), "what a flag turns off stands in off"
    if row.refused or row.with_scales or row.with_lengths or row.default is not None:
        left_out = Namespace(**{row.name: action.default})
        assert row.is_left_out(left_out), f"its default is {action.default}"


def test_every_argument_says_something():
    plain = argument_table.Argument(name="x")
    facts = [f for f in vars(plain) if f not in ("name", "flag", "off", "default", "computed")]
    empty = [
        row.name
        for row in argument_table._ROWS
        if all(getattr(row, fact) == getattr(plain, fact) for fact in facts)
    ]
    assert empty == []


@pytest.mark.parametrize(
    "row", [row for row in argument_table._ROWS if row.refused], ids=lambda row: row.name
)
def test_what_a_run_must_leave_out_is_refused_by_its_flag(row):
    from megatron_cream.mcore.validation import validate_left_out

    validate_left_out(Namespace(**{row.name: row.default}))
    said = f"^{argument_table.flag_of(row.name)} is 3: it must be left out, "
    with pytest.raises(UserError, match=said):
        validate_left_out(Namespace(**{row.name: 3}))


@pytest.mark.parametrize(
    "row", [row for row in argument_table._ROWS if row.range], ids=lambda row: row.name
)
def test_a_number_that_no_run_can_have_is_refused_by_its_flag(row):
    from megatron_cream.mcore.validation import validate_ranges

    for wrong in (-2, float("nan"), float("inf"), 2**63):
        with pytest.raises(
            UserError, match=rf"^{argument_table.flag_of(row.name)} is \S+: it must"
        ):
            validate_ranges(Namespace(**{"window_size": None, row.name: wrong}))


def test_the_command_line_of_a_cpu_gives_the_values_of_the_table(parser):
    parsed = parser.parse_args(argument_table.cpu_flags())
    expected = argument_table.values("cpu")
    assert {name: getattr(parsed, name) for name in expected} == expected
    assert len(expected) > 10


def test_a_range_holds_for_its_borders_only():
    for numbers, inside, outside in (
        (argument_table.COUNT, (1, 2**63 - 1), (0, 2**63)),
        (argument_table.AMOUNT, (0, 2**63 - 1), (-1e-9, 2**63)),
        (argument_table.SEED, (1, 2**32 - 1), (0, 2**32)),
        (argument_table.BELOW_ONE, (0, 0.999), (1, -0.1)),
        (argument_table.SHARE, (0, 1), (1.001, -0.001)),
        (argument_table.ABOVE_ZERO_SHARE, (0.001, 1), (0, 1.001)),
    ):
        assert all(map(numbers.holds, inside)) and not any(map(numbers.holds, outside))


def test_norms_around_one_are_not_exported():
    """Megatron's --apply-layernorm-1p, under the name that its arguments have in a checkpoint."""
    from megatron_cream.checkpoint.model_shape import exportable_shape

    exportable = argument_table.values("hugging_face")
    with pytest.raises(UserError, match="--apply-layernorm-1p of the checkpoint is True"):
        exportable_shape(Namespace(**exportable | {"layernorm_zero_centered_gamma": True}))


def test_what_has_no_place_beside_a_scale_per_sample_is_refused():
    from megatron_cream.mcore.validation import validate_left_out

    given = Namespace(use_megatron_fsdp=True, use_torch_fsdp2=False, cuda_graph_impl="none")
    with pytest.raises(UserError, match="--use-megatron-fsdp is True with clex: it must be left o"):
        validate_left_out(given, "with_scales", " with clex")
    given.use_megatron_fsdp = False
    validate_left_out(given, "with_scales", " with clex")


def test_what_has_one_length_is_refused_beside_others():
    from megatron_cream.mcore.validation import validate_left_out

    given = Namespace(tp_comm_overlap=False, cuda_graph_impl="none")
    validate_left_out(given, "with_lengths")
    for name, value in (("tp_comm_overlap", True), ("cuda_graph_impl", "local")):
        with pytest.raises(UserError, match=f"is {value}.*have the trained length"):
            validate_left_out(Namespace(**vars(given) | {name: value}), "with_lengths")
