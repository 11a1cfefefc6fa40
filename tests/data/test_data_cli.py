"""The command line: what it prints, and that an error is a sentence and a status."""

import pytest

from vit_jax.data import tasks
from vit_jax.data.__main__ import main


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


def test_show_prints_splits_counts_and_classes(capsys):
    assert main(["show", "cifar100_excerpt"]) == 0
    printed = capsys.readouterr().out
    for part in ("train", "1,000 pictures of 32 x 32", "500 pictures", "10 classes: lion, sunflower"):
        assert part in printed


def test_prepare_prints_the_folder_and_shows_progress(capsys, monkeypatch, tiny, pack, tmp_path):
    monkeypatch.setitem(tasks.TASKS, "cifar100", tiny)
    assert main(["prepare", "cifar100", "--archive", str(pack())]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'data' / 'cifar100' / '3.0.2'}\n"
    assert "160/160" in captured.err
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
