"""The studies of docs/recipes.md: each is a valid command of `vit_jax ablate`."""

import shlex

import pytest

from benchmarks import recipes


@pytest.mark.parametrize("name", recipes.STUDIES)
def test_study_is_valid_and_prints_its_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert recipes.main([name, "--dry_run", "--output", str(tmp_path / "runs")]) == 0
    assert "base" in capsys.readouterr().out


def test_batches_see_the_same_number_of_images():
    *_, change = shlex.split(recipes.STUDIES["batch-linear"])
    fields = dict(word.split("=") for word in change.split())
    sizes, steps = (fields[name].split(",") for name in ("training.batch_size", "training.steps"))
    assert {int(size) * int(count) for size, count in zip(sizes, steps, strict=True)} == {20_480}
    assert fields["optimizer.rate_scaling"] == "linear"


def test_list_has_every_command_and_an_unknown_name_is_an_error(capsys):
    assert recipes.main(["--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(recipes.STUDIES)
    assert recipes.main(["augment"]) == 2 and "NAME is one of: changes" in capsys.readouterr().err
