"""The command line of the data: what it prints, and that every error is one line and a status."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import tasks
from vit_jax.data.__main__ import main
from vit_jax.data.places import find_prepared
from vit_jax.data.prepare import prepare
from vit_jax.data.splits import open_split

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "vit_jax.data", "list"]


@pytest.fixture(autouse=True)
def data_dir(monkeypatch, tmp_path):
    """No test reads the data that the user has prepared."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))


def test_list_names_every_task_and_where_it_is(capsys):
    assert main(["list"]) == 0
    rows, _, others = capsys.readouterr().out.partition("Others:\n")
    lines = rows.splitlines()
    assert [line.split()[0] for line in lines] == list(tasks.TASKS)
    assert [line.split(":")[0].strip() for line in others.splitlines()] == list(tasks.OTHERS)
    assert lines[0].split()[0] == "cifar100_excerpt"
    assert lines[0].endswith("1.0.0")
    assert lines[-1].endswith("not prepared")


def test_list_and_show_find_the_embedded_data_with_any_data_dir(capsys, tiny, pack, tmp_path):
    prepare(tiny, pack(), tmp_path)
    embedded = find_prepared(tasks.TASKS["cifar100_excerpt"])
    assert main(["list", "--data_dir", str(tmp_path)]) == 0
    found = {
        line.split()[0]: line.split("classes")[1].strip()
        for line in capsys.readouterr().out.partition("Others")[0].splitlines()
    }
    prepared = {name: place for name, place in found.items() if place != "not prepared"}
    assert prepared == {"cifar100_excerpt": str(embedded), "cifar100": str(tmp_path / "cifar100/3.0.2")}
    for command in ("show", "prepare"):
        assert main([command, "cifar100_excerpt", "--data_dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(embedded)


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
def test_error_is_one_line_and_a_status(capsys, arguments, message):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_full_output_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        done = subprocess.run(COMMAND, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_full_disk_under_the_grid_is_one_line_and_status_1(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    code = f"{limit}; import runpy; runpy.run_module('vit_jax.data', run_name='__main__')"
    command = [sys.executable, "-c", code, "show", "cifar100_excerpt", "--output", str(tmp_path / "grid.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path}/grid.png: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_is_no_error():
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before the process prints its first line
    assert process.communicate()[1] == b"" and process.returncode == 0


def test_ctrl_c_while_data_are_written_is_one_line_and_status_130(tiny, files, tmp_path, pack):
    """The signal arrives when the first image is encoded; nothing stays but the lock file."""
    code = f"""
import dataclasses, runpy, signal, sys
from vit_jax.data import prepare, tasks
signal.signal(signal.SIGINT, signal.default_int_handler)
row = tasks.TASKS["cifar100"]
archive = dataclasses.replace(row.archive, examples={tiny.archive.examples})
tasks.TASKS["cifar100"] = dataclasses.replace(row, archive=archive)
prepare._png = lambda pixels: signal.raise_signal(signal.SIGINT)
runpy.run_module("vit_jax.data", run_name="__main__")
"""
    command = [sys.executable, "-c", code, "prepare", "cifar100", "--archive", pack(), "--data_dir", tmp_path / "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in done.stderr and find_prepared(tiny, tmp_path / "data") is None
