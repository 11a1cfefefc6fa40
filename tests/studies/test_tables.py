"""Tables as Markdown and CSV, and the plot of differences."""

import csv

import pytest

from vit_jax.studies import paired, tables


def test_markdown_has_a_heading_and_escapes_bars():
    assert tables.markdown([["a", "b"], ["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def test_csv_reads_back(tmp_path):
    rows = [["change", "mean"], ["augment.crop_area=(0.3,1.0)", "1"]]
    tables.write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == rows


def test_plot_shows_each_difference_with_its_interval(tmp_path):
    scores = {"base": {0: 70.0, 1: 72.0}, "up": {0: 73.0, 1: 73.0}, "down": {0: 69.0, 1: 70.0}, "diverged": {}}
    found = paired.compare(scores).rows
    figure = tables.differences(found, "points")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "down", "diverged"]
    (up, _), (down, _) = (container.lines[2][0].get_segments()[0] for container in axis.containers)
    assert up[0] == pytest.approx(2 - found["up"].margin) and down[0] == pytest.approx(-1.5 - found["down"].margin)
    for name in ("a.svg", "b.svg"):
        tables.write_figure(tmp_path / "x" / name, figure)
    tables.write_figure(tmp_path / "a.svg", tables.differences(found, "points"))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "x" / "a.svg").read_bytes()
