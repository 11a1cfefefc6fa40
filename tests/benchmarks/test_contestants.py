"""The contestants on a model so small that a process runs it in a moment."""

import os

import pytest

from benchmarks.__main__ import parse
from benchmarks.contestants import Ours, RandomImages, Work, compare
from vit_jax.errors import UserError
from vit_jax.models.variants import build, flops

ONE_DEVICE = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
NANO = ["--model", "Nano/8", "--size", "32", "--batch", "8", "--rounds", "3"]


@pytest.mark.slow
def test_row_holds_what_was_measured(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    result = compare("inference", parse([*NANO, "--attention", "auto,xla"]))
    first, second = result.rows
    assert [first["name"], second["name"]] == ["vit_jax (auto)", "vit_jax (xla)"] and result.notes == []
    assert first["flops"] == 8 * flops(build("Nano/8", num_classes=100), 32) and first["rounds"] == 3
    assert first["images_per_second"] == pytest.approx(8 / first["seconds"])
    assert first["seconds_low"] <= first["seconds"] <= first["seconds_high"]
    assert first["planned"] > 2**20 and first["memory"] > 2**20 and first["attention"] == "xla"
    assert first["ratio"] is None and second["ratio"]["low"] <= second["ratio"]["median"] <= second["ratio"]["high"]
    assert result.versions.keys() == {"jax", "flax", "optax"}


@pytest.mark.slow
def test_peer_that_is_not_installed_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = compare("inference", parse([*NANO, "--peer", "timm"]))
    assert [row["name"] for row in result.rows] == ["vit_jax"]
    assert result.notes == ["timm is not included: timm ended with status 1: ImportError: torch is not here"]


def test_our_failure_is_an_error():
    with pytest.raises(UserError, match="vit_jax ended with status 1: .*does not divide among"):
        compare("train", parse([*NANO, "--batch", "9"]))


@pytest.mark.slow
def test_contestant_works_on_a_copy_of_the_state(pico):
    ours = Ours(Work.of(parse(pico), "train"), 20)
    run, about = ours.contestant()
    assert run(2) > 0 and about()["planned"] > 0
    ours.work = Work.of(parse(pico), "inference")
    run, _ = ours.contestant()
    assert run(2) > 0 and int(ours.state.step) == 0  # a contestant works on a copy


def test_random_images_are_a_source():
    source = RandomImages(5, 3)
    images, labels, _ = source.read([1, 4])
    assert images.shape == (2, 32, 32, 3) and images.dtype == "uint8" and set(labels) <= {0, 1, 2}
    assert len(source) == 5 and source.nbytes == 5 * 32 * 32 * 3
