"""The learning curves show the metrics of the runs, and the runs can be distinguished."""

import matplotlib.colors
import numpy as np
import pytest

from tests.reports.pages import render
from vit_jax.reports import canvas
from vit_jax.reports.curves import learning_curves

LINES = [
    {"step": step, "train/loss": 4.0 / step, "train/learning_rate": 0.1 * step}
    | ({"test/loss": 1.0, "test/accuracy": step / 100, "test/accuracy_top5": 1.0} if step % 10 == 0 else {})
    for step in range(1, 41)
]


def test_curves_equal_the_metrics():
    loss, accuracy, rate = learning_curves({"one": LINES}).axes
    raw, mean, test = loss.get_lines()
    np.testing.assert_allclose(raw.get_ydata(), [line["train/loss"] for line in LINES])
    assert len(mean.get_xdata()) == 39 and mean.get_ydata()[0] == pytest.approx(np.mean([4.0, 2.0]))
    assert list(test.get_xdata()) == [10, 20, 30, 40]
    np.testing.assert_allclose(accuracy.get_lines()[0].get_ydata(), [10, 20, 30, 40])
    np.testing.assert_allclose(accuracy.get_lines()[1].get_ydata(), 100)
    np.testing.assert_allclose(rate.get_lines()[0].get_ydata(), [line["train/learning_rate"] for line in LINES])


def test_each_of_several_runs_has_its_colour():
    figure = learning_curves({"one": LINES, "two": LINES[:20], "three": []})
    loss, accuracy, rate = figure.axes
    assert len(loss.get_lines()) == 6 and len(accuracy.get_lines()) == len(rate.get_lines()) == 3
    assert len({line.get_color() for line in rate.get_lines()}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "three"]
    render(figure)


def test_runs_with_long_names_are_distinguishable():
    names = [f"a-run-that-has-a-rather-long-name-as-sweeps-give-them-to-{'their-' * 8}runs-{number}" for number in range(10)]
    figure = learning_curves(dict.fromkeys(names, LINES))
    render(figure)
    styles = {
        (matplotlib.colors.to_hex(line.get_color()), str(line._unscaled_dash_pattern)) for line in figure.axes[2].get_lines()
    }
    assert len(styles) == 10
    entries = figure.legends[0].get_texts()
    assert [text.get_text().replace("\n", "") for text in entries] == names
    box, room = figure.legends[0].get_window_extent(), figure.bbox
    assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0
    assert figure.axes[0].get_window_extent().width > 0.8 * room.width


@pytest.mark.parametrize("lines", [[], LINES[:1], [{"step": 3, "test/accuracy": 0.5}]])
def test_curves_of_a_run_with_few_metrics_are_drawn(lines):
    render(learning_curves({"one": lines}))


def with_norms(scale):
    return [line | {"train/gradient_norm": scale, "train/loss": scale * line["train/loss"]} for line in LINES]


def test_gradient_norm_is_drawn_if_it_was_written():
    *_, norm = learning_curves({"one": with_norms(1.5)}).axes
    assert norm.get_title(loc="left") == "gradient norm" and norm.get_xlabel() == "step"
    np.testing.assert_allclose(norm.get_lines()[0].get_ydata(), 1.5)


@pytest.mark.parametrize("others", [1, 2, 9])
def test_diverged_run_does_not_flatten_the_others(others):
    runs = {f"run {i}": with_norms(1 + 0.1 * i) for i in range(others)} | {"diverged": with_norms(1e20)}
    loss, *_, norm = learning_curves(runs).axes
    assert 3 < loss.get_ylim()[1] < 8 and 1 < norm.get_ylim()[1] < 3
    assert "shown up to" in loss.get_title(loc="left") and "shown up to" in norm.get_title(loc="left")
    loss, *_, norm = learning_curves({"a": with_norms(1), "b": with_norms(2)}).axes
    assert loss.get_title(loc="left") == "loss" and norm.get_title(loc="left") == "gradient norm"


def test_curves_of_a_single_diverged_run_are_logarithmic():
    lines = [{"step": step, "train/loss": 2.3 if step < 30 else 10.0 ** (step - 28)} for step in range(1, 41)]
    loss, *_ = learning_curves({"one": lines}).axes
    assert loss.get_yscale() == "log" and loss.get_title(loc="left") == "loss, logarithmic"


def test_legend_of_line_kinds_is_grey():
    loss, *_ = learning_curves({"one": LINES, "two": LINES}).axes
    handles = loss.get_legend().get_lines()
    assert {line.get_color() for line in handles} == {"#666666"} and not {"#666666"} & set(canvas.COLOURS)


def test_thirty_runs_are_distinguishable():
    *_, rate = learning_curves({f"run {i}": LINES for i in range(30)}).axes
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in rate.get_lines()}) == 30
