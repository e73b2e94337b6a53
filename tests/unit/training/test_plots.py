"""Pictures show what the numbers are: extremes, gaps, units, names."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megagpt.training.history import read_histories
from megagpt.training.plots import DARK, LIGHT, MEDIANS, PICTURES, compact, medians, plot_losses, render, thin
from tests.unit.training.fake_runs import FakeRun, write_records

DRAW = {picture.name: picture.draw for picture in PICTURES}
VALUES = st.floats(-1e6, 1e6) | st.just(math.nan)


@given(arrays.arrays(np.float64, st.integers(1, 500), elements=VALUES), st.integers(8, 60))
def test_a_thinned_curve_has_its_extremes_its_ends_and_its_gaps(y, points):
    x = np.arange(len(y), dtype=float)
    thin_x, thin_y = thin(x, y, points)
    assert len(thin_x) <= max(points, min(len(y), points))
    assert np.array_equal(thin_y, y[thin_x.astype(int)], equal_nan=True), "points are original ones"
    assert (np.diff(thin_x) > 0).all()
    assert thin_x[[0, -1]].tolist() == [0, len(y) - 1]
    if np.isfinite(y).any():
        assert np.nanmin(thin_y) == np.nanmin(y)
        assert np.nanmax(thin_y) == np.nanmax(y)
    assert np.isnan(thin_y).any() == np.isnan(y).any()


@given(arrays.arrays(np.float64, st.integers(1, 300), elements=VALUES), st.integers(1, 40))
def test_the_smooth_line_is_numpys_median_of_each_stretch(y, bins):
    x = np.arange(len(y), dtype=float) * 3
    length = math.ceil(len(y) / bins)
    stretches = [slice(start, start + length) for start in range(0, len(y), length)]
    places, values = medians(x, y, bins)
    known = [y[one][np.isfinite(y[one])] for one in stretches]
    expected = [np.median(values) if len(values) else math.nan for values in known]
    assert np.allclose(values, expected, equal_nan=True)
    assert np.allclose(places, [x[one].mean() for one in stretches])
    assert len(values) <= bins


def test_a_skipped_step_is_a_gap_and_a_value_between_gaps_a_dot(tmp_path):
    (run,) = read_histories([FakeRun(steps=600, ranks=(4,), stops_at=(), skipped=(200, 220)).write(tmp_path / "run")])
    axes = DRAW["loss"]([run], LIGHT).axes[0]
    curve = next(line for line in axes.lines if line.get_label() == "training")
    assert curve.get_xdata()[np.isnan(curve.get_ydata())].tolist() == [200, 220]
    (dots,) = [line for line in axes.lines if line.get_marker() == "."]
    assert dots.get_xdata().tolist() == [210]
    (crosses,) = [line for line in axes.lines if line.get_label() == "skipped step"]
    assert crosses.get_xdata().tolist() == [200, 220]


def test_a_long_run_is_drawn_faint_with_all_extremes_and_medians_in_front(tmp_path):
    records = [
        {"kind": "train", "step": step, "loss": 9.5 if step == 4321 else 0.5 if step == 777 else 2 + step % 3}
        for step in range(1, 10_001)
    ]
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    faint, smooth = DRAW["loss"]([run], LIGHT).axes[0].lines
    assert faint.get_alpha() < 0.5
    assert (faint.get_ydata().min(), faint.get_ydata().max()) == (0.5, 9.5)
    assert len(faint.get_xdata()) <= 2000
    assert len(smooth.get_xdata()) == MEDIANS
    assert set(smooth.get_ydata()) == {3.0}


def test_losses_are_drawn_by_tokens_too_when_a_step_is_not_as_many_tokens_in_every_run(tmp_path):
    options = {"steps": 300, "ranks": (4,), "stops_at": ()}
    same, other, large = read_histories(
        [
            FakeRun(**options).write(tmp_path / "same"),
            FakeRun(**options, seed=1).write(tmp_path / "other"),
            FakeRun(**options, batch_size=512).write(tmp_path / "large"),
        ]
    )
    for name, datasets in (("loss", 1), ("validation_loss", 2)):
        figure = DRAW[name]([same, other], LIGHT)
        assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer step"] * datasets
        figure = DRAW[name]([same, large], LIGHT)
        assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer step", "tokens"] * datasets
        ends = {line.get_label(): line.get_xdata()[-1] for line in figure.axes[1].lines if len(line.get_xdata()) > 1}
        assert ends == {"same": 300 * 256 * 1024, "large": 300 * 512 * 1024}


def test_runs_are_told_apart_by_legend_and_colour_in_every_theme(tmp_path):
    names = ["plain", "_underscore", "price $x_{ of $"]
    runs = read_histories([FakeRun(steps=100, ranks=(4,), stops_at=()).write(tmp_path / name) for name in names])
    for theme in (LIGHT, DARK):
        figure = DRAW["learning_rate"](runs, theme)
        legend = figure.legends[0]
        assert [text.get_text().strip() for text in legend.get_texts()] == names
        assert len({line.get_color() for line in legend.get_lines()}) == 3
        assert render(next(one for one in PICTURES if one.name == "learning_rate"), runs, theme) is not None


def test_more_runs_than_colours_differ_in_their_lines(tmp_path):
    runs = read_histories(
        [FakeRun(steps=20, ranks=(4,), stops_at=()).write(tmp_path / f"run{number}") for number in range(20)]
    )
    lines = DRAW["learning_rate"](runs, LIGHT).axes[0].lines
    assert len({(line.get_color(), str(line.get_linestyle()), line._unscaled_dash_pattern) for line in lines}) == 20


def test_every_picture_of_one_record_shows_it(tmp_path):
    records = [record for record in FakeRun(steps=10).records if record["kind"] == "train"][:1]
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    drawn = {picture.name: picture.draw([run], LIGHT) for picture in PICTURES}
    assert [name for name, figure in drawn.items() if figure is None] == ["validation_loss"], "that is within loss"
    for name in ("loss", "throughput", "gradient_norm", "learning_rate", "goodput"):
        assert [line for line in drawn[name].axes[0].lines if line.get_marker() == "."], name


def test_pictures_without_data_are_left_out(tmp_path):
    (run,) = read_histories([write_records(tmp_path / "run", [{"kind": "start", "step": 0}])])
    assert [picture.name for picture in PICTURES if picture.draw([run], LIGHT) is not None] == []


def test_the_shares_of_the_time_fill_the_bar(tmp_path):
    (run,) = read_histories([FakeRun().write(tmp_path / "run")])
    (axes,) = DRAW["time"]([run], LIGHT).axes
    spent = {part: seconds for part, seconds in run.time_spent().items() if seconds > 0}
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([100 * seconds / sum(spent.values()) for seconds in spent.values()])
    assert sum(widths) == pytest.approx(100)


def test_the_picture_of_the_quickstart_has_the_baseline_and_the_validation_loss(tmp_path):
    path = plot_losses(FakeRun(steps=100).write(tmp_path / "run"), {"unigram model": 5.5})
    assert path == tmp_path / "run" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.25, "0.25"), (999, "999"), (999.6, "1k"), (1500, "1.5k"), (12_345_678, "12.3M"), (2e12, "2T"),
     (5e15, "5,000T")],
)  # fmt: skip
def test_numbers_on_axes_are_short(number, text):
    assert compact(number) == text
