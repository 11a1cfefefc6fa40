"""The studies of docs/recipes.md: each is a valid command of `vit_jax ablate`."""

import argparse
import itertools
import shlex
from pathlib import Path

import pytest

from benchmarks import recipes
from vit_jax.config import difference
from vit_jax.config_files import read
from vit_jax.studies import ablate

ROOT = Path(__file__).parents[2]


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


def test_best_recipe_is_that_of_its_config():
    """The configuration of docs/recipes.md's figure, but for how often it is evaluated and saved."""
    arguments = recipes.arguments("best")
    parsed = dict(product=False, seeds=2, held_out="", metric="accuracy", output=None, source=arguments[0], vary=[], config=[])
    for option, value in itertools.pairwise(arguments):
        if option in ("--vary", "--config"):
            parsed[option[2:]].append(value)
    study = ablate.plan(argparse.Namespace(**parsed), "")
    theirs = study.cells[recipes.BEST][42].config
    ours = read(f"{ROOT / 'configs' / 'cifar100_best.py'}:mini_8,short")
    ours.data.image_size = 32
    assert difference(ours, theirs) == ["training.eval_every", "training.save_every"]


def test_list_has_every_command_and_an_unknown_name_is_an_error(capsys):
    assert recipes.main(["--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(recipes.STUDIES)
    assert recipes.main(["augment"]) == 2 and "NAME is one of: changes" in capsys.readouterr().err
