# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import exit_status, load_file

from megatron_cream.positions import Coverage, coverage, make_strategy
from megatron_cream.positions.coverage import describe
from megatron_cream.positions.plots import default_samples, draw

TOOL = Path(__file__).parents[2] / "tools" / "plot_positions.py"
LENGTHS = ["--train-length", "256", "--target-length", "4096"]


@pytest.fixture(scope="module")
def tool():
    return load_file(TOOL)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def assert_is_a_picture(path):
    shown = pixels(path)
    height, width, _ = shown.shape
    assert 1000 <= width <= 3000
    assert 700 <= height <= 2000
    assert 0.02 < np.mean(shown.min(axis=2) < 250) < 0.9  # neither empty nor a black page


def lines_of(text):
    """The report as {what: value}."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def test_report_names_the_holes():
    strategy = make_strategy("cream", 4096, 262144)
    result = coverage(strategy, 2000)
    text = describe(strategy, result)
    assert len(result.holes) == 2
    for low, high in result.holes:
        assert f"{low}..{high}" in text
        assert f"{high - low + 1} distances" in text
        assert f"{100 * (high - low + 1) / 262143:.3g} %" in text
    assert "N = 4096, T = 262144, factor 64, 2000 samples" in text
    assert f"covered: {100 * result.covered:.3g} % of [1, 262144)" in text


def test_report_agrees_with_the_counts():
    strategy = make_strategy("cream", 4096, 32768)
    result = coverage(strategy, 500)
    shares = result.sample_counts / 500
    text = describe(strategy, result)
    for low, high in [(1, 4096), (4096, 10923), (10923, 21846), (21846, 32768)]:
        assert f"[{low}, {high})".ljust(20) + f"{100 * shares[low:high].mean():.3g} %" in text
    least = next(line for line in text.splitlines() if "least, from 4096" in line)
    assert least.endswith(f"{100 * shares[4096:].min():.3g} %")
    far = result.pair_counts[4096:].sum() / result.pair_counts[1:].sum()
    assert lines_of(text)["pairs at distance >= N"] == f" {100 * far:.3g} %"
    middle = lines_of(text)["middle chunks' centres"]
    assert f"middle third {100 * result.middle_thirds[1]:.3g} %" in middle
    trained = lines_of(text)["trained positions"]
    assert f"last third {100 * result.token_thirds[2]:.3g} %" in trained


def test_report_without_holes_and_without_a_middle():
    strategy = make_strategy("pose", 64, 64)
    text = describe(strategy, coverage(strategy, 5))
    assert "holes: none" in text
    assert "covered: 100 %" in text
    assert "middle chunks" not in text


def test_report_shows_the_longest_of_many_holes():
    counts = np.ones(1000, dtype=np.int64)
    counts[100:400:10] = 0  # thirty of one distance each
    counts[500:520] = 0
    strategy = make_strategy("full", 1000, 1000)
    result = Coverage(1, counts, counts.astype(float), np.array([]), (1.0, 0.0, 0.0))
    text = describe(strategy, result)
    assert "holes: 31," in text
    assert "  500..519            20 distances, 2 %" in text
    assert "  100                 1 distance, 0.1 %" in text
    assert "and 23 more" in text


def test_one_hole_in_a_million_is_not_rounded_away():
    counts = np.ones(2**20, dtype=np.int64)
    counts[77] = 0
    strategy = make_strategy("full", 2**20, 2**20)
    result = Coverage(1, counts, counts.astype(float), np.array([]), (1.0, 0.0, 0.0))
    assert "covered: 99.99990 %" in describe(strategy, result)


@pytest.mark.parametrize(
    ("name", "train", "target", "options"),
    [
        ("cream", 250, 2001, {"sigma": 0.3}),
        ("cream", 64, 64, {}),
        ("pose", 100, 1000, {"chunks": 100}),
        ("randpos", 256, 4096, {}),
        ("full", 1, 1, {}),
    ],
)
def test_every_strategy_can_be_drawn(tmp_path, name, train, target, options):
    strategy = make_strategy(name, train, target, **options)
    layouts = [strategy.layout(1, index) for index in range(5)]
    draw(strategy, coverage(strategy, 20), layouts, tmp_path / "a.png")
    assert_is_a_picture(tmp_path / "a.png")


def test_holes_are_shaded(tmp_path):
    strategy = make_strategy("full", 256, 4096)
    draw(strategy, coverage(strategy, 1), [strategy.layout(1, 0)], tmp_path / "a.png")
    shown = pixels(tmp_path / "a.png").astype(int)
    reddish = (shown[..., 0] > 230) & (shown[..., 1] < 235) & (shown[..., 0] - shown[..., 1] > 10)
    assert reddish.mean() > 0.2


def test_tool_prints_the_report_and_the_path(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool.main([*LENGTHS, "--strategy", "cream", "--sigma", "1", "--samples", "300"]) == 0
    out, err = capsys.readouterr()
    strategy = make_strategy("cream", 256, 4096, sigma=1.0)
    assert out.startswith(describe(strategy, coverage(strategy, 300, seed=1234)))
    assert out.endswith("picture: positions-cream.png\n")
    assert err == ""
    assert_is_a_picture(tmp_path / "positions-cream.png")


def test_tool_takes_training_flags(tool, tmp_path, capsys):
    flags = ["--seq-length", "256", "--target-length", "4096", "--position-strategy", "pose"]
    flags += ["--pose-chunks", "3", "--pose-content", "zero", "--samples", "50"]
    output = tmp_path / "p.png"
    assert tool.main([*flags, "--output", str(output), "--seed", "5", "--layouts", "3"]) == 0
    strategy = make_strategy("pose", 256, 4096, chunks=3)
    assert describe(strategy, coverage(strategy, 50, seed=5)) in capsys.readouterr().out
    assert_is_a_picture(output)


def test_plain_samples_are_drawn_among_the_others(tool, tmp_path, capsys):
    flags = ["--seq-length", "256", "--target-length", "2048", "--position-strategy", "cream"]
    flags += ["--plain-share", "0.5", "--samples", "50", "--output", str(tmp_path / "p.png")]
    assert tool.main(flags) == 0
    assert "cream, 50 % plain: N = 256" in capsys.readouterr().out
    assert_is_a_picture(tmp_path / "p.png")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--strategy", "cream", "--plain-share", "2"], "--plain-share"),
        (["--strategy", "cream", "--head-lengths", "200"], "--cream-head-lengths"),
        (["--strategy", "cream", "--sigma", "0"], "--cream-sigma"),
        (["--strategy", "pose", "--sigma", "3"], "'sigma'"),
        (["--strategy", "cream", "--samples", "0"], "--samples"),
        (["--strategy", "cream", "--samples", "5", "--output", "no/folder/a.png"], "--output"),
        (["--strategy", "cream", "--samples", "5", "--output", "a.xyz"], "xyz"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tool, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert exit_status(tool.main, [*LENGTHS, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--strategy", "creme"], "creme"),
        ([], "--strategy"),
        (["--strategy", "cream", "--layouts", "0"], "--layouts"),
        (["--strategy", "cream", "--sigma", "wide"], "--sigma"),
    ],
)
def test_flags_that_cannot_be_read_are_one_line(tool, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        tool.main([*LENGTHS, *flags])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_missing_matplotlib_says_what_to_install(tool, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert exit_status(tool.main, [*LENGTHS, "--strategy", "cream"]) == 2
    out, err = capsys.readouterr()
    assert "pip install -e '.[plot]'" in err
    assert out == ""  # said before the counting, not after


def test_tool_runs_as_a_script_without_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, TOOL, *LENGTHS, "--strategy", "full", "--samples", "9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "holes: 1," in done.stdout
    assert_is_a_picture(tmp_path / "positions-full.png")


@pytest.mark.parametrize(
    ("name", "options", "samples"),
    [
        ("full", {}, 32_000),
        ("cream", {}, 32_000),
        ("randpos", {}, 128),
    ],
)
def test_default_samples_keep_the_counting_short(name, options, samples):
    assert default_samples(make_strategy(name, 4096, 262144, **options)) == samples
