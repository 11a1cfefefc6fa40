"""The sweep over models and tasks: protocol, table, and what a kill leaves."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.config_files import to_json
from vit_jax.errors import ConfigError, DataError
from vit_jax.models.variants import build, shapes
from vit_jax.studies import vtab

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.image_size=16", "augment.crop='none'", "training.batch_size=16", "training.grad_accum_steps=1",
    "data.test_split=test[:50]", "training.save_every=3",
]  # fmt: skip


@pytest.fixture
def models(tmp_path):
    """Three npz files of tiny models with random weights."""
    paths = []
    for width in (8, 16, 24):
        model = build("B/8", hidden_size=width, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5)
        draw = np.random.default_rng(width)
        flat = flatten_dict(shapes(model, 16), sep="/")
        path = tmp_path / f"tiny{width}.npz"
        np.savez(path, **{name: draw.normal(scale=0.2, size=leaf.shape).astype(np.float32) for name, leaf in flat.items()})
        paths.append(str(path))
    return paths


def arguments(models, output, tasks="cifar100_excerpt", steps="6", rates="0.01,0.1"):
    options = [option for value in SMALL for option in ("--config", value.replace("'", ""))]
    return ["--models", ",".join(models), "--tasks", tasks, "--steps", steps, "--lrs", rates, "--output", str(output), *options]


def rows(output):
    with open(output / "table.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.slow
def test_sweep_chooses_on_validation_and_tests_once(models, tmp_path, capsys):
    output = tmp_path / "sweep"
    assert vtab.main(arguments(models[:1], output)) == 0
    header, ours, chosen = rows(output)
    assert header == ["model", "", "cifar100_excerpt"] and ours[1] == "vit_jax" and 0 <= float(ours[2]) <= 100
    searched = sorted(path.name for path in (output / "search").iterdir())
    assert len(searched) == 2 and all(
        "test/accuracy" in (output / "search" / name / "metrics.jsonl").read_text() for name in searched
    )
    (final,) = (output / "final").iterdir()
    assert (
        final.name.endswith("-".join(chosen[2].split(", "))) and '"validation_split": ""' in (final / "config.json").read_text()
    )
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.npz")}
    capsys.readouterr()
    assert vtab.main(arguments(models[:1], output)) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.npz")} == before
    assert "of 2]" not in capsys.readouterr().err and "<table" in (output / "index.html").read_text()


@pytest.mark.slow
def test_run_that_fails_is_named_and_the_others_go_on(models, tmp_path, capsys):
    more = ["--config", f"run.data_dir={tmp_path}"]
    assert vtab.main([*arguments(models[:1], tmp_path / "sweep", "pets,cifar100_excerpt", rates="0.1"), *more]) == 1
    error = capsys.readouterr().err
    assert "only TFDS can prepare it: run `tfds build oxford_iiit_pet" in error and "1 runs failed" in error
    assert [value == "–" for value in rows(tmp_path / "sweep")[1]] == [False, False, True, False]


def test_damaged_model_ends_the_sweep_before_it_begins(models, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"not an npz")
    assert vtab.main(arguments([models[0], str(broken)], tmp_path / "sweep")) == 1
    assert "broken.npz is not an npz file or is truncated" in capsys.readouterr().err and not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_folder_of_another_sweep_is_refused_by_name(models, tmp_path, capsys):
    output = tmp_path / "sweep"
    assert vtab.main(arguments(models[:1], output, rates="0.1")) == 0
    assert vtab.main([*arguments(models[:1], output, rates="0.1"), "--config", "seed=3"]) == 1
    assert "holds a run with other values of seed: name another --output" in capsys.readouterr().err


def test_means_of_groups_and_differences_are_those_of_the_paper(tmp_path):
    published = vtab.paper()
    assert len(published) == 27 and all(len(row) == 22 for row in published.values())
    theirs = published[vtab.PRETRAINING, "B/16"]
    found = {("B/16", name): value for name, value in theirs.items() if not name.endswith("_mean")}
    for name, value in vtab.means({name: value for (_, name), value in found.items()}).items():
        assert abs(value - theirs[name]) < 0.06  # rounded to 0.1 in print
    vtab.write(tmp_path, ["B/16"], vtab.tasks("all"), found, {})
    table = rows(tmp_path)
    differences = dict(zip(table[0][2:], table[3][2:], strict=True))
    assert len(differences) == 22 and {abs(float(value)) for value in differences.values()} <= {0.0, 0.1}


def test_tasks_are_named_by_group_or_name():
    assert len(vtab.tasks("all")) == 19 and len(vtab.tasks("specialized")) == 4
    assert vtab.tasks("pets,natural")[0] == "caltech101" and vtab.tasks("cifar10") == ["cifar10"]
    with pytest.raises(DataError, match="there is no folder 'x'"):
        vtab.tasks("hub:a/b@image,label,folder:x")
    with pytest.raises(DataError, match="no task 'petz'; did you mean 'pets'"):
        vtab.tasks("petz")


def test_dry_run_lists_runs_and_cost(capsys):
    assert vtab.main(["--models", "B/16", "--tasks", "pets,svhn", "--steps", "500", "--lrs", "0.01", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 2 runs of 500 steps of 512 images, 3 × 35.1 GFLOP an image
    assert len(lines) == 3 and "1 + 1 runs, at most 512,000 training images, 54." in lines[0] and lines[2].startswith("4 runs")


def test_dry_run_leaves_out_what_is_finished(capsys, tmp_path):
    command = [
        "--models",
        "mini_8",
        "--tasks",
        "cifar100_excerpt",
        "--steps",
        "6",
        "--lrs",
        "0.01,0.1",
        "--output",
        str(tmp_path),
    ]
    one = vtab.cell("mini_8", "cifar100_excerpt", 6, 0.1, (), search=True)
    (tmp_path / one.name).mkdir(parents=True)
    (tmp_path / one.name / "config.json").write_text(to_json(one.config))
    (tmp_path / one.name / "metrics.jsonl").write_text('{"step": 6, "test/accuracy": 0.5}\n')
    (tmp_path / one.name / "final.npz").touch()
    assert vtab.main([*command, "--dry_run"]) == 0
    assert "1 + 1 runs (1 finished), at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "training.batch=3",
        "training.batch_size",
        "training.batch_size=x",
        "seed=-1",
        "training.steps=3",
        "training.epochs=2",
        "training.patience=3",
    ],
)
def test_wrong_field_is_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        vtab.cell("mini_8", "cifar100_excerpt", 10, 0.1, [override], search=True)


@pytest.mark.full
def test_killed_sweep_ends_with_the_table_of_one_never_killed(models, tmp_path):
    tasks = ["cifar100_excerpt"]
    for number in (1, 2):  # other tasks: two classes of the images, as folders
        from PIL import Image

        from vit_jax.data.splits import open_split
        from vit_jax.data.tasks import TASKS

        images, labels = open_split(TASKS["cifar100_excerpt"], "train").take(np.arange(1000))
        for index in np.flatnonzero(labels // 2 == number):
            for split in ("train", "test"):
                path = tmp_path / f"pair{number}" / split / str(labels[index]) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(path)
        tasks.append(f"folder:{tmp_path / f'pair{number}'}")

    def command(output):
        return [
            sys.executable,
            "-m",
            "vit_jax.studies.vtab",
            *arguments(models, tmp_path / output, ",".join(tasks), "20"),
        ]

    draw = np.random.default_rng(3)
    for number in (signal.SIGKILL, signal.SIGTERM):  # in a later cell each time
        with subprocess.Popen(
            command("killed"), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            begun = (line for line in process.stderr if line.startswith("["))
            for _ in range(2 if number == signal.SIGTERM else 1):
                assert next(begun)
            time.sleep(draw.uniform(0, 4))
            process.send_signal(number)
            process.stderr.read()
            assert process.wait(60) in (-9, 143)
    for output in ("killed", "whole"):
        subprocess.run(command(output), cwd=ROOT, check=True, capture_output=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_rate_that_diverges_is_the_worst(models, tmp_path, capsys):
    more = ["--config", "optimizer.clip_norm=0"]
    for trains in (True, False):  # the second time nothing is trained
        assert vtab.main([*arguments(models[:1], tmp_path / "sweep", rates="0.01,1e6"), *more]) == 0
        assert rows(tmp_path / "sweep")[-1][2] == "6, 0.01" and ("of 2]" in capsys.readouterr().err) == trains
