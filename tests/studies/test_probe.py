"""The probe from its command line: the embedded model on the embedded images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.models.intermediates import features
from vit_jax.studies import probe

ROOT = Path(__file__).parents[2]


def arguments(output, checkpoint="mini_8", size="32"):
    return [
        "--checkpoint", checkpoint, "--task", "cifar100_excerpt", "--image_size", size, "--epochs", "5", "--lrs", "0.01,0.1",
        "--decays", "0,0.01", "--output", str(output),
    ]  # fmt: skip


@pytest.mark.slow
def test_probe_of_the_embedded_model(tmp_path, capsys):
    from vit_jax import load
    from vit_jax.transforms.preprocess import for_evaluation

    assert probe.main(arguments(tmp_path)) == 0
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "probe.json").read_text())
    assert (record["held_out_images"], len(record["linear"]["grid"]), record["image_size"]) == (100, 4, 32)
    assert record["linear"]["test_accuracy"] > 0.5 and record["knn"]["test_accuracy"] > 0.5  # of ten classes
    assert "chosen on 100 of 1,000 training images (the last 10 %)" in printed.out and "Features: " in printed.out
    assert printed.out.startswith((tmp_path / "table.md").read_text().split("\nEvery linear head")[0])
    (kept,) = (tmp_path / "features").glob("test-*/00000.npz")
    images, labels = open_split(task("cifar100_excerpt"), "test").take(np.arange(16))
    model, params = load("mini_8", num_classes=0, image_size=32)
    prepared = for_evaluation(32, model.normalization, model.eval_crop)(images)
    with np.load(kept) as file:
        np.testing.assert_allclose(file["features"][:16], features(model, params, prepared), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(file["labels"][:16], labels)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert probe.main(arguments(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == before
    assert json.loads((tmp_path / "probe.json").read_text()) == record


@pytest.mark.parametrize(
    ("name", "word"),
    [("B/16", "B_16"), ("R+Ti/16", "R+Ti_16"), ("runs/demo/", "demo"), ("folder:flowers/all", "all"), ("csv:a/b.csv", "b.csv")],
)
def test_default_folder_has_a_readable_name(tmp_path, monkeypatch, name, word):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert probe._word(name) == word


def test_rows_of_the_table_have_one_test_accuracy_for_each_classifier():
    record = {
        "knn": {"held_out_accuracy": {"1": 0.5, "5": 0.6}, "k": 5, "test_accuracy": 0.55},
        "linear": {
            "grid": [{"held_out_accuracy": 0.7}, {"held_out_accuracy": 0.8}],
            "learning_rate": 0.1, "weight_decay": 0.0, "test_accuracy": 0.75,
        },
    }  # fmt: skip
    assert probe.table(record)[1:] == [
        ["1 nearest neighbours", "50.00", ""],
        ["5 nearest neighbours", "60.00", "55.00"],
        ["linear head, rate 0.1, decay 0 (of 2)", "80.00", "75.00"],
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--checkpoint", "mini_9", "mini_9"),
        ("--task", "cifar1000", "no task 'cifar1000'"),
        ("--image_size", "33", "--image_size 33: image_size 33×33 is not divisible into patches"),
        ("--image_size", "-8", "--image_size must be from 0"),
        ("--batch_size", "0", "--batch_size must be from 1"),
        ("--epochs", "nan", "--epochs must be from"),
        ("--temperature", "-1", "--temperature must be from 0 to 1,000,000.0, got -1.0"),
        ("--held_out", "test[90%:]", "the training split is 'train', and only a part of that can be held out"),
        ("--held_out", "train[5000:]", "some of the 1,000 training images must be held out, and some must not"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, option, value, message):
    assert probe.main([*arguments(tmp_path / "probe"), option, value]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "probe").exists()


@pytest.mark.slow
def test_interrupted_probe_goes_on_with_the_features_it_has(tmp_path):
    command = [sys.executable, "-m", "vit_jax", "probe", *arguments(tmp_path), "--batch_size", "8"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        while not list(tmp_path.glob("features/train-*/*.npz")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read() and process.wait(60) == 130
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}.items()
    assert (tmp_path / "probe.json").is_file()
