"""The parts, with few rounds on tiny models."""

import pytest

from benchmarks import data, parts
from benchmarks.__main__ import parse
from benchmarks.page import table
from benchmarks.parts import PARTS, _main_until, _missing_packages
from vit_jax.data import stream
from vit_jax.errors import UserError


def test_evaluation_counts_every_image(pico):
    (row,) = PARTS["evaluation"](parse([*pico, "--images", "20"])).rows
    assert row["images"] == 20 and row["full"]["median"] > 0
    assert row["images_per_second"] == pytest.approx(20 / row["seconds"])


@pytest.mark.slow
def test_loop_is_compared_with_its_step(pico):  # on one device
    if note := _missing_packages():
        pytest.skip(*note)
    (row,) = PARTS["loop"](parse(["--steps", "12"])).rows
    assert row["steps"] == 12 and row["overhead"] == pytest.approx(row["mean"] - row["alone"])


@pytest.mark.full
def test_streamed_images_are_compared_with_resident_ones_and_with_decoding(pico, monkeypatch):
    monkeypatch.setattr(data, "_SHAPES", {"JPEG, small": [(50, 37), (37, 50)]})
    monkeypatch.setattr(stream, "number_of_workers", lambda wanted: 1)
    result = PARTS["data"](parse([*pico, "--rounds", "1", "--images", "200", "--batch", "4"]))
    names = ["CIFAR, resident", "CIFAR, streamed", "JPEG, small, bare Pillow", "JPEG, small, streamed"]
    assert [row["name"] for row in result.rows] == names
    assert all(row["images_per_second"] > 0 for row in result.rows)
    assert ["growth" in row for row in result.rows] == [False, True] * 2
    assert table("data", result.rows).count("\n") == 5


def test_main_py_that_fails_reports_its_error(tmp_path):
    with pytest.raises(UserError, match=r"main.py ended with status 2: .*no_such_config"):
        _main_until(tmp_path / "never", "--config=no_such_config.py")


@pytest.mark.slow
def test_startup_ends_with_the_first_step(pico, monkeypatch):
    if note := _missing_packages():
        pytest.skip(*note)
    monkeypatch.setattr(parts, "_import", lambda statement, n, measured=parts._import: measured("import json", n))
    result = PARTS["startup"](parse([*pico, "--rounds", "1"]))  # each is many interpreters
    names = [row["name"].split(",")[0] for row in result.rows]
    assert names == ["import jax", "import vit_jax", "import vit_jax; vit_jax.train", "main.py", "main.py"]
    assert all(row["seconds"] > 0 for row in result.rows) and result.notes == []
