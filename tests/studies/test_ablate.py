"""Ablations: what a command line means, what is refused before anything runs, and a study that is killed."""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.config_files import to_json
from vit_jax.data import splits
from vit_jax.studies import ablate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(config, tmp_path):
    """The file of the small configuration, with few steps."""
    config.data.train_split = config.data.test_split = ""
    config.training.steps, config.training.eval_every = 4, 1
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(to_json(config))
    return str(path)


def plan(source, *vary, **options):
    values = dict(product=False, seeds=2, held_out="", config=[], metric="accuracy", output=None) | options
    return ablate.plan(argparse.Namespace(source=source, vary=list(vary), **values), "the command")


def rows(output):
    with open(output / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_value_is_one_change_and_the_base_is_not_repeated(source):
    found = plan(source, "augment.flip=true,false", "optimizer.learning_rate=0.1,0.03,0.2")
    assert list(found.cells) == ["base", "augment.flip=false", "optimizer.learning_rate=0.1", "optimizer.learning_rate=0.2"]
    config = found.cells["optimizer.learning_rate=0.1"][4].config
    assert (config.seed, config.augment.flip, config.optimizer.learning_rate) == (4, True, 0.1)
    assert [cell.config.seed for cell in found.in_order()] == [3] * 4 + [4] * 4
    assert found.folder == Path("runs/ablate-small")


def test_product_has_every_combination(source):
    found = plan(source, "augment.flip=true,false", "optimizer.learning_rate=0.03,0.2", product=True)
    assert list(found.cells) == [
        "base",
        "augment.flip=true optimizer.learning_rate=0.2",
        "augment.flip=false optimizer.learning_rate=0.03",
        "augment.flip=false optimizer.learning_rate=0.2",
    ]


def test_fields_with_spaces_between_them_change_together(source):
    found = plan(source, "optimizer.name=adamw optimizer.learning_rate=0.001,0.003", "augment.crop_area=(0.3,1.0),(0.5,1)")
    assert list(found.cells)[1:] == [
        "optimizer.name=adamw optimizer.learning_rate=0.001",
        "optimizer.name=adamw optimizer.learning_rate=0.003",
        "augment.crop_area=(0.3,1.0)",
        "augment.crop_area=(0.5,1)",
    ]
    config = found.cells["augment.crop_area=(0.5,1)"][3].config
    assert config.augment.crop_area == (0.5, 1) and config.optimizer.name == "sgd"


def test_folders_differ_and_do_not_depend_on_the_other_changes(source):
    names = ["data.normalization=dataset", "augment.crop_area=(0.3,1.0)", "augment.crop_area=(0.31,1.0)"]
    found = {name: row[3].name for name, row in plan(source, *names).cells.items()}
    assert len(set(found.values())) == 4 and all("/seed3" in name and "(" not in name for name in found.values())
    assert plan(source, names[1]).cells[names[1]][3].name == found[names[1]]


@pytest.mark.parametrize(
    ("vary", "options", "every"),
    [
        ("augment.flip=false", {}, [4, 4]),
        ("training.steps=6", {}, [4, 6]),
        ("augment.flip=false", {"config": ["training.eval_every=2"]}, [2, 2]),
        ("augment.flip=false", {"config": ["training.patience=1", "data.validation_split=own"]}, [1, 1]),
    ],
)
def test_runs_are_evaluated_at_their_end_unless_told_otherwise(source, vary, options, every):
    assert [row[3].config.training.eval_every for row in plan(source, vary, **options).cells.values()] == every


def test_base_is_measured_without_changes(source):
    assert list(plan(source).cells) == ["base"] and len(plan(source).cells["base"]) == 2


def test_table_names_the_split_of_its_figures(source):
    assert "accuracy on test of cifar100_excerpt, the test images" in plan(source, "augment.flip=false").measured
    found = plan(source, "augment.flip=false", config=["data.validation_split=own"])
    assert "accuracy on train[90%:] of" in found.measured and found.metrics == ("validation/accuracy",)
    found = plan(source, "augment.flip=false", held_out="train[90%:]", metric="raw_accuracy,accuracy")
    assert "no test image is read" in found.measured and found.metrics == ("test/raw_accuracy", "test/accuracy")
    assert found.title == "raw_accuracy or accuracy on train[90%:] of cifar100_excerpt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "optimizer.lr=1"], "--vary optimizer.lr=1: expected FIELD=VALUE with a field"),
        (["--vary", "optimizer.learning_rate"], "expected FIELD=VALUE"),
        (["--vary", ""], "expected FIELD=VALUE,VALUE"),
        (["--vary", "optimizer.learning_rate=fast"], "optimizer.learning_rate must be of type float, got 'fast'"),
        (["--vary", "training.batch_size=1.5"], "training.batch_size=1.5: training.batch_size must be of type int"),
        (["--vary", "augment.crop_area=(0.3,1.0"], "a bracket or a quote is not closed"),
        (["--vary", "optimizer.momentum=0.1,0.2 optimizer.b2=0.1,0.2,0.3"], "one value or equally many"),
        (["--vary", "optimizer.warmup_steps=3,9"], "optimizer.warmup_steps=9: optimizer.warmup_steps = 9 must be shorter"),
        (["--vary", "seed=1"], "each change is trained with --seeds seeds"),
        (["--vary", "data.test_split=train"], "figures of different images cannot be compared"),
        (["--vary", "run.remat=true"], "fields of run do not change the numbers"),
        (["--vary", "augment.flip=true"], "every value of --vary is the base's own"),
        (["--vary", "augment.flip=false", "--metric", "acuracy"], "--metric acuracy: expected accuracy, accuracy_top5, loss"),
        (["--vary", "training.steps=9 training.epochs=2"], "a change has only one of them"),
        (["--vary", "model.checkpoint=~nosuchuser/x.npz"], "the user '~nosuchuser' does not exist"),
        (["--vary", "augment.flip=false", "--seeds", "0"], "--seeds must be from 1"),
        (["--vary", "augment.flip=false", "--config", "seed=-1"], "base: seed must be from 0"),
        (["--vary", "data.train_split=train[:50%]", "--held_out", "train[90%:]"], "--held_out sets it"),
        (["--vary", "augment.flip=false", "--held_out", "test[:50%]"], "only a part of that can be held out"),
        (
            ["--vary", "augment.flip=false", "--config", "data.test_split=test", "--held_out", "train[90%:]"],
            "--held_out sets it",
        ),
    ],
)
def test_wrong_command_line_is_one_line_before_anything_runs(source, tmp_path, capsys, arguments, message):
    assert ablate.main([source, *arguments, "--output", str(tmp_path / "study")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "study").exists()


def test_dry_run_prints_runs_and_cost(source, tmp_path, capsys):
    arguments = [source, "--vary", "training.batch_size=32", "--seeds", "2", "--output", str(tmp_path / "study"), "--dry_run"]
    assert ablate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Measured: accuracy on test of cifar100_excerpt")
    assert lines[1].startswith("base                    2 runs, 128 training images, ")
    assert lines[2].startswith("training.batch_size=32  2 runs, 256 training images, ") and lines[3].startswith("4 runs, ")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_study_reads_no_test_image_and_writes_its_table(source, tmp_path, capsys, monkeypatch):
    opened, original = set(), splits.open_split

    def recorded(task, split, *rest):
        opened.add(split)
        return original(task, split, *rest)

    monkeypatch.setattr(splits, "open_split", recorded)
    output = tmp_path / "study"
    arguments = [source, "--vary", "augment.flip=false", "--vary", "optimizer.learning_rate=1e30", "--seeds", "1"]
    arguments += ["--held_out", "train[90%:]", "--config", "optimizer.clip_norm=0", "--output", str(output)]
    arguments[4] = "optimizer.learning_rate=1e6"
    assert ablate.main(arguments) == 0
    assert opened == {"train[:90%]", "train[90%:]"}
    base, change, diverged = rows(output)
    assert float(change["difference"]) == pytest.approx(float(change["seed 3"]) - float(base["seed 3"]), abs=1e-3)
    assert diverged["missing"] == "1 of 1 diverged" and diverged["mean"] == "" and float(base["training_seconds"]) > 0
    printed = capsys.readouterr()
    text = (output / "table.md").read_text()
    assert text.startswith("Measured: accuracy on train[90%:] of cifar100_excerpt, training images that were held out;")
    assert "1 of 1 diverged" in printed.out and printed.out.splitlines()[0] in text and "--vary augment.flip=false" in text
    assert "<svg" in (output / "differences.svg").read_text() and not list(output.rglob("report.html"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.npz")}
    assert ablate.main(arguments) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.npz")} == before
    assert "of 3]" not in capsys.readouterr().err
    assert ablate.main([*arguments, "--config", "training.batch_size=8"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a run with other values of training.batch_size: name another --output" in error


def test_run_that_fails_is_named_and_the_others_go_on(source, tmp_path, capsys):
    missing = str(tmp_path / "no.npz")
    arguments = [source, "--vary", f"model.checkpoint={missing}", "--seeds", "1", "--output", str(tmp_path / "study")]
    assert ablate.main(arguments) == 1
    assert "no.npz" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_study_ends_with_the_table_of_one_that_two_processes_share(source, tmp_path):
    def start(output):
        arguments = [source, "--vary", "augment.flip=false", "--seeds", "2", "--output", str(tmp_path / output)]
        command = [sys.executable, "-m", "vit_jax", "ablate", *arguments]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    processes = [start("whole") for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum(text.count("compiling the training step") for text in errors) == 4  # each run once
    with start("killed") as process:
        begun = (line for line in process.stderr if line.startswith("["))
        assert next(begun) and next(begun)
        process.kill()
    with start("killed") as process:
        assert "[1 of 4]" not in process.communicate(timeout=300)[1] and process.returncode == 0
    killed, whole = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    for row in (*killed, *whole):
        row.pop("training_seconds")
    assert killed == whole and all(row["margin_95"] for row in whole[1:])
