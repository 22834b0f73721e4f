# SPDX-License-Identifier: Apache-2.0
"""Pictures show what results say: values, paired intervals, windows, names that can be read."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from support.results import LENGTHS, perplexities_of, result_of

from megatron_cream.evaluation.charts import apart
from megatron_cream.evaluation.perplexity import buckets
from megatron_cream.evaluation.pictures import change_line, draw, picture, ratio_line


def words(figure):
    """All texts of a figure."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def whiskers(axes):
    return sum(len(c.get_segments()) for c in axes.collections if isinstance(c, LineCollection))


@pytest.mark.parametrize("places", [[], [3.0], [0, 0, 0], [5, 4, 30, 31, 6], [10, 0, 9, 1, 5]])
def test_names_are_moved_apart(places):
    moved = apart(places, 4)
    assert all(b - a >= 4 - 1e-9 for a, b in itertools.pairwise(sorted(moved)))
    assert np.argsort(moved, kind="stable").tolist() == np.argsort(places, kind="stable").tolist()
    assert sum(moved) == pytest.approx(sum(places))


def test_names_that_have_room_stay():
    assert apart([20, 0, 10], 10) == [20, 0, 10]


def test_names_of_equal_lines_do_not_overlap():
    runs = [result_of("common-words", name, share=0.0) for name in ("base", "PoSE", "CREAM")]
    figure = picture(runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() in ("base", "PoSE", "CREAM")]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    right = max(line.get_window_extent().x1 for line in axes.lines if len(line.get_xdata()) > 2)
    assert all(box.x0 >= right for box in boxes)


def test_ratios_are_of_paired_documents():
    generator = np.random.default_rng(0)
    base = generator.normal(3, 1, 8)  # documents differ far more than models
    other = base - 0.2 + generator.normal(0, 0.01, 8)
    first, second = perplexities_of("base", base), perplexities_of("CREAM", other)
    line = ratio_line(first, second)
    differences = other - base
    half = 2.365 * differences.std(ddof=1) / math.sqrt(8)
    assert line.x == list(LENGTHS)
    assert line.y == pytest.approx([math.exp(differences.mean())] * 3)
    assert line.low == pytest.approx([math.exp(differences.mean() - half)] * 3)
    assert line.high == pytest.approx([math.exp(differences.mean() + half)] * 3)
    rows = zip(first["lengths"], second["lengths"], strict=True)
    quotients = [own["perplexity"] / other["perplexity"] for other, own in rows]
    assert line.y == pytest.approx(quotients)
    itself = ratio_line(first, first)
    assert itself.y == [1, 1, 1] and itself.low == [None] * 3


def test_change_with_length_is_of_paired_documents():
    generator = np.random.default_rng(1)
    result = perplexities_of("base", generator.normal(3, 1, 6))
    drops = generator.normal(0.1, 0.01, 6)
    first, second = result["lengths"][:2]
    second["document_nll"] = list(np.array(first["document_nll"]) - drops)
    line = change_line(result | {"lengths": [first, second]})
    half = 2.571 * drops.std(ddof=1) / math.sqrt(6)
    assert line.y == pytest.approx([first["perplexity"] * f for f in (1, math.exp(-drops.mean()))])
    assert line.low[0] is None and line.high[0] is None
    assert line.low[1] == pytest.approx(first["perplexity"] * math.exp(-drops.mean() - half))
    assert line.high[1] == pytest.approx(first["perplexity"] * math.exp(-drops.mean() + half))


def test_ratios_at_common_lengths_and_of_one_document():
    first, second = perplexities_of("a", [3.0]), perplexities_of("b", [2.5], lengths=(2048, 8192))
    line = ratio_line(first, second)
    assert line.x == [2048] and line.low == [None]


def test_perplexity_of_one_run_and_of_several():
    runs = [perplexities_of("base", [3.0, 3.5, 2.8]), perplexities_of("CREAM", [2.9, 3.3, 2.7])]
    left, right = picture(runs[:1]).axes
    assert whiskers(left) == len(LENGTHS) - 1
    ends = [line for line in right.lines if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in ends] == ["1K", "2K", "4K"]
    assert len(ends[-1].get_xdata()) == len(buckets(4096)) - 1
    left, right = picture(runs).axes
    assert whiskers(left) == 0 and whiskers(right) == len(LENGTHS)
    assert "base's" in right.get_ylabel()
    assert [t.get_text() for t in left.get_xticklabels()] == ["1K", "2K", "4K"]


def test_window_is_marked():
    assert words(picture([perplexities_of("base", [3.0, 3.1])])).count("window 2K") == 2
    trained = picture([perplexities_of("base", [3.0])], window="trained window {}")
    assert "trained window 2K" in words(trained)
    assert "window 2K" in words(picture([result_of("needle")]))
    inside = picture([result_of("needle", lengths=(1024, 2048))])
    assert not any("window" in word for word in words(inside))


@pytest.mark.parametrize("task", ["needle", "passkey", "niah-multikey"])
def test_maps_show_every_place_and_length(task):
    result = result_of(task)
    axes = picture([result]).axes[-1]
    shown = [text for text in axes.texts if text.get_text().isdigit()]
    cells = {tuple(math.floor(at) for at in t.get_position()[::-1]): t.get_text() for t in shown}
    places = sorted({row["where"] for row in result["places"]})
    wanted = {
        (places.index(row["where"]), LENGTHS.index(row["length"])): f"{100 * row['hit']:.0f}"
        for row in result["places"]
    }
    assert cells == wanted and len(set(wanted.values())) > 1
    assert "3 cases a cell" in axes.get_title(loc="left")


def test_maps_of_several_runs_have_the_beginning_on_top():
    figure = picture([result_of("needle", name) for name in ("base", "CREAM")])
    assert [axes.get_ylim() for axes in figure.axes] == [(5, 0)] * 2
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["base", "CREAM"]


def test_maps_of_many_runs_are_in_rows_that_fit_a_page():
    names = [f"model {i}" for i in range(7)]
    figure = picture([result_of("needle", name) for name in names])
    assert [axes.get_title(loc="left") for axes in figure.axes] == names
    assert figure.get_figwidth() <= 13
    figure.draw_without_rendering()
    maps = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(maps, 2))
    assert len({round(box.y0) for box in maps}) == 3
    lefts = [axes.get_ylabel() != "" for axes in figure.axes]
    assert lefts == [True, False, False, True, False, False, True]


def test_middle_third_is_marked():
    runs = [result_of("kv-retrieval", name) for name in ("base", "CREAM")]
    one_length = [result_of("kv-retrieval", lengths=(1024,))]
    for results in (runs, runs[:1], one_length):
        figure = picture(results)
        assert "middle third" in words(figure)
        assert len(figure.axes) == 2
    bracket = picture(runs[:1]).axes[1].lines[-1]
    assert list(bracket.get_ydata()) == pytest.approx([2.08, 2.92])  # row 2 of 0 .. 4


def test_intervals_by_place_where_lengths_are_not_mixed():
    runs = [result_of("kv-retrieval", name) for name in ("base", "CREAM")]
    assert whiskers(picture(runs).axes[1]) == 0
    assert whiskers(picture([result_of("kv-retrieval", lengths=(1024,))]).axes[1]) == 5


def test_a_map_of_many_places_is_taller():
    few, many = (picture([result_of("needle", places=n)]) for n in (5, 25))
    many.draw_without_rendering()
    assert many.get_figheight() > few.get_figheight()
    texts = [t.get_window_extent() for t in many.axes[0].texts if t.get_text().isdigit()]
    assert len(texts) == 75
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))


def test_picture_of_all_tasks(tmp_path):
    results = [perplexities_of("base", [3.0, 3.1]), result_of("needle"), result_of("common-words")]
    draw(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
