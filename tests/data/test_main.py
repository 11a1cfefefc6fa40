"""The command line: what it prints, and that an error is a sentence and a status."""

import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import tasks
from vit_jax.data.__main__ import main
from vit_jax.data.sources import open_split


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """No test looks into what the user has prepared."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))


def test_list_names_every_task_and_where_it_is(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(tasks.TASKS)
    assert lines[0].split()[0] == "cifar100_excerpt"
    assert lines[0].endswith("1.0.0")
    assert lines[-1].endswith("not prepared")


def test_show_prints_splits_and_counts_of_classes(capsys):
    assert main(["show", "cifar100_excerpt"]) == 0
    printed = capsys.readouterr().out
    for part in ("train", "1,000 images of 32 x 32", "500 images", "10 classes"):
        assert part in printed
    assert ["lion", "100", "50"] in [line.split() for line in printed.splitlines()]


def test_show_draws_a_grid_of_training_images(capsys, tmp_path):
    path = tmp_path / "new" / "grid.png"
    assert main(["show", "cifar100_excerpt", "--output", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    page = np.asarray(Image.open(path))
    assert page.shape == (960, 160 + 960, 3)
    source = open_split(tasks.TASKS["cifar100_excerpt"], "train")
    images, labels = source.take(np.arange(len(source)))
    for row, column in ((0, 0), (3, 9), (9, 4)):
        cell = page[row * 96 + 2 :, 160 + column * 96 + 2 :][:64, :64]  # each pixel drawn as 2 x 2
        np.testing.assert_array_equal(cell[::2, ::2], images[labels == row][column])
        assert (page[row * 96 : row * 96 + 96, :160] != 255).any()  # the name of the class
    assert main(["show", "cifar100_excerpt", "--output", "grid.jpg"]) == 1
    assert "error: --output grid.jpg: expected a name that ends in .png" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_prepare_prints_the_folder_and_shows_progress_on_a_terminal(capsys, monkeypatch, tiny, pack, tmp_path, terminal):
    monkeypatch.setitem(tasks.TASKS, "cifar100", tiny)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert main(["prepare", "cifar100", "--archive", str(pack())]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'data' / 'cifar100' / '3.0.2'}\n"
    assert (" images/s" in captured.err and "160/160" in captured.err) == terminal
    assert main(["show", "cifar100"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "cifar1000"], "did you mean 'cifar100'?"),
        (["show", "cifar100"], "run `python -m vit_jax.data prepare cifar100`"),
        (["prepare", "cifar100", "--archive", "nothing.tar.gz"], "nothing.tar.gz cannot be read"),
    ],
)
def test_an_error_is_one_sentence_and_a_status(capsys, arguments, message):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
