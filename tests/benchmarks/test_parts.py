"""The parts, with few rounds on tiny models."""

import pytest

from benchmarks.__main__ import parse
from benchmarks.parts import PARTS, _main_until, _missing_packages
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


def test_main_py_that_fails_reports_its_error(tmp_path):
    with pytest.raises(UserError, match=r"main.py ended with status 2: .*no_such_config"):
        _main_until(tmp_path / "never", "--config=no_such_config.py")


@pytest.mark.slow
def test_startup_ends_with_the_first_step(pico):
    if note := _missing_packages():
        pytest.skip(*note)
    result = PARTS["startup"](parse([*pico, "--rounds", "1"]))  # each is many interpreters
    names = [row["name"].split(",")[0] for row in result.rows]
    assert names == ["import jax", "import vit_jax", "import vit_jax; vit_jax.train", "main.py", "main.py"]
    assert all(row["seconds"] > 0 for row in result.rows) and result.notes == []
