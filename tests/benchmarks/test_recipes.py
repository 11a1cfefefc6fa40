"""The studies of docs/recipes.md: each is a valid command of `vit_jax ablate`."""

import argparse
import itertools
import shlex
from pathlib import Path

import pytest

from benchmarks import recipes
from vit_jax.config import difference
from vit_jax.config_files import read
from vit_jax.studies import ablate, tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", recipes.STUDIES)
def test_study_is_valid_and_prints_its_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert recipes.main([name, "--dry_run", "--output", str(tmp_path / "runs")]) == 0
    assert "base" in capsys.readouterr().out


def test_batches_see_the_same_number_of_images():
    changes = [change.split() for change in shlex.split(recipes.STUDIES["batches"]) if "training.batch_size" in change]
    for change in changes:
        fields = dict(word.split("=") for word in change)
        sizes, steps = (fields[name].split(",") for name in ("training.batch_size", "training.steps"))
        assert {int(size) * int(count) for size, count in zip(sizes, steps, strict=True)} == {20_480}
    assert [change[3:] for change in changes] == [
        [],
        ["optimizer.base_batch_size=64"],
        ["optimizer.base_batch_size=64", "optimizer.rate_scaling=sqrt"],
    ]


def test_plot_of_batch_sizes_has_a_line_for_each_rule_and_leaves_out_what_diverged(tmp_path):
    changes = ("base", "training.batch_size=128", "training.batch_size=128 optimizer.base_batch_size=64")
    scores = ((70, 72, 71), (60, 62, 61), ("", "", ""))
    rows = [["change", "seed 42", "seed 43", "mean"], *([name, *found] for name, found in zip(changes, scores, strict=True))]
    tables.write_csv(tmp_path / "table.csv", rows)
    axis = recipes.batch_sizes(tmp_path).axes[0]
    means = {line.get_label(): line.get_xydata().tolist() for line in axis.lines if not line.get_label().startswith("_")}
    start = [64.0, 71.0]
    assert means == {"the rate of 64": [start, [128.0, 61.0]], "times the factor": [start], "times its root": [start]}
    assert recipes.main(["--plot", str(tmp_path)]) == 0 and (tmp_path / "batch_sizes.svg").read_text().startswith("<?xml")


def test_plot_of_a_study_without_its_second_seed_leaves_that_out(tmp_path):
    rows = [["change", "seed 42", "seed 43", "mean"], ["base", 70, "", 70], ["training.batch_size=128", 60, "", 60]]
    tables.write_csv(tmp_path / "table.csv", rows)
    axis = recipes.batch_sizes(tmp_path).axes[0]
    assert sorted({tuple(point) for line in axis.lines for point in line.get_xydata().tolist()}) == [(64, 70), (128, 60)]


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
