"""What a run leaves: predictions and last metrics, written again when they are missing or damaged."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.training.states import same
from vit_jax import metrics as metrics_file
from vit_jax.config_files import to_json
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.errors import ConfigError, DataError
from vit_jax.formats.google import read_meta
from vit_jax.reports.page import write
from vit_jax.training import devices, loop, outputs, restore
from vit_jax.training.assemble import assemble
from vit_jax.training.command import report
from vit_jax.training.evaluate import metrics
from vit_jax.transforms.preprocess import for_evaluation


def test_predictions_file_is_of_the_final_weights(uninterrupted, config):
    workdir, result = uninterrupted
    model, params = vit_jax.load(str(workdir / "final.npz"))
    assert same(params, result.params)
    images, labels = open_split(task("cifar100_excerpt"), "test[:50]").take(np.arange(50))
    with np.load(workdir / "predictions.npz") as stored:
        logits, stored_labels = stored["logits"], stored["labels"]
    assert np.array_equal(stored_labels, labels)
    expected = model.apply({"params": params}, for_evaluation(16)(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert metrics(logits, labels)["accuracy"] == result.metrics["test/accuracy"]


def test_finished_run_without_its_files_is_evaluated_again(uninterrupted, config, tmp_path):
    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "predictions.npz").unlink()
    again = loop.train(config, tmp_path / "run")
    assert again.metrics == result.metrics
    assert (tmp_path / "run" / "predictions.npz").exists()


def logits(path):
    with np.load(path) as file:
        return file["logits"].tobytes()


@pytest.mark.parametrize("damage", ["nothing", "truncated", "of another split"])
def test_finished_run_renews_damaged_predictions_without_its_checkpoint(uninterrupted, config, tmp_path, damage):
    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "predictions.npz"
    expected = logits(path)
    if damage == "nothing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        np.savez(path, logits=np.zeros((3, 10), np.float32), labels=np.zeros(3, np.int32))
    config.model.checkpoint = str(shutil.copy(config.model.checkpoint, tmp_path / "gone.npz"))
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        record = json.loads((step / "record" / "metadata").read_text())
        del record["record_sha256"]
        record["config"]["model"]["checkpoint"] = config.model.checkpoint
        (step / "record" / "metadata").write_text(json.dumps({**record, "record_sha256": restore._digest_of_json(record)}))
    os.remove(config.model.checkpoint)
    again = loop.train(config, tmp_path / "run")
    assert again.metrics == result.metrics and logits(path) == expected
    assert read_meta(tmp_path / "run" / "final.npz") == read_meta(workdir / "final.npz")  # with the hash of what was read
    assert loop.evaluate(config, tmp_path / "run")["test/accuracy"] == result.metrics["test/accuracy"]


@pytest.fixture
def validated(config):
    config.data.train_split, config.data.validation_split = "train[:64]", "train[64:96]"
    return config


def test_validation_split_chooses_the_best_and_the_test_split_is_measured_once(validated, tmp_path):
    result = loop.train(validated, tmp_path)
    lines = metrics_file.read(tmp_path)
    chosen = {line["step"]: line["validation/accuracy"] for line in lines if "validation/accuracy" in line}
    assert list(chosen) == [4, 8, 12] and [line["step"] for line in lines if "test/accuracy" in line] == [12]
    assert result.metrics["best/accuracy"] == max(chosen.values()) == chosen[result.metrics["best/step"]]
    # The best state's test accuracy is that of best.npz, computed by hand.
    model, params = vit_jax.load(str(tmp_path / "best.npz"))
    images, labels = open_split(task("cifar100_excerpt"), "test[:50]").take(np.arange(50))
    logits = model.apply({"params": params}, for_evaluation(16)(images))
    assert result.metrics["best/test_accuracy"] == np.mean(np.argmax(logits, 1) == labels)
    # A finished run measures nothing again, and --eval_only measures both splits.
    before = (tmp_path / "metrics.jsonl").read_text()
    assert loop.train(validated, tmp_path).metrics == result.metrics and (tmp_path / "metrics.jsonl").read_text() == before
    found = loop.evaluate(validated, tmp_path)
    assert {name: result.metrics[name] for name in found} == found and "validation/loss" in found and "test/loss" in found


@pytest.mark.slow
def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(validated, tmp_path, monkeypatch):
    validated.optimizer.learning_rate, validated.training.patience = 1e-30, 1  # the first evaluation stays the best
    result = loop.train(validated, tmp_path / "whole")
    lines = metrics_file.read(tmp_path / "whole")
    assert result.finished and result.metrics["step"] == lines[-1]["step"] == 8 and result.metrics["best/step"] == 4
    assert [line["step"] for line in lines if "test/accuracy" in line] == [8]
    assert read_meta(tmp_path / "whole" / "final.npz")["step"] == 8
    page = write(tmp_path / "whole").read_text()
    assert "</strong> after 8 steps" in page and "12 steps of 16 images; ended by training.patience after 8" in page
    # Measured again, elsewhere, the last state may be better by a rounding error; the best one and the end stay what they are.
    (tmp_path / "whole" / "predictions.npz").unlink()
    measure = outputs._measure

    def better(*arguments):
        found, logits, labels = measure(*arguments)
        return {name: value + 0.01 for name, value in found.items()}, logits, labels

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "_measure", better)
        again = loop.train(validated, tmp_path / "whole")
    assert again.finished and again.metrics["best/step"] == 4 and (tmp_path / "whole" / "predictions.npz").exists()
    # Ended after the last state is saved and before the test split is measured; then again when all is done.
    real = outputs.complete
    monkeypatch.setattr(outputs, "complete", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(validated, tmp_path / "cut")
    monkeypatch.setattr(outputs, "complete", real)
    for _ in range(2):
        assert loop.train(validated, tmp_path / "cut").metrics == result.metrics
    steps = [line["step"] for line in metrics_file.read(tmp_path / "cut") if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_epochs_are_written_out_as_steps(config, tmp_path):
    config.training.epochs = 1.5  # of 64 images: 6 steps of 16
    result = loop.train(config, tmp_path)
    assert result.metrics["step"] == 6 and json.loads((tmp_path / "config.json").read_text())["training"]["steps"] == 6
    assert "6 steps of 16 images, 1.5 epochs" in write(tmp_path).read_text()
    assert loop.train(config, tmp_path).metrics == result.metrics
    config.training.epochs = 2.0
    with pytest.raises(ConfigError, match="these fields differ: training.epochs"):
        loop.train(config, tmp_path)


@pytest.mark.slow
def test_messages_and_page_say_which_split_a_figure_is_of(validated, tmp_path):
    result = loop.train(validated, tmp_path)
    text = report(validated, result.metrics)
    assert (
        "Accuracy on test[:50] " in text
        and "on train[64:96]" in text
        and "chosen on train[64:96]; accuracy on test[:50]" in text
    )
    page = write(tmp_path).read_text()
    assert "chosen on the split train[64:96], where the accuracy on test[:50] is" in page
    assert "Each evaluation uses all images of the split train[64:96]" in page and "<td>train[64:96]</td>" in page


def test_own_validation_split_leaves_its_images_out_of_training(validated, tmp_path):
    validated.data.train_split, validated.data.validation_split = "", "own"
    parts = assemble(validated, devices.start(validated.run))
    assert [len(source) for source in parts.sources] == [900, 50, 100]
    assert "900 training, 100 validation and 50 test images" in parts.describe()


@pytest.mark.parametrize(("split", "kind"), [("train[60:70]", "train"), ("test[40:60]", "test")])
def test_validation_images_among_the_others_are_refused(validated, split, kind):
    validated.data.validation_split = split
    with pytest.raises(DataError, match=rf"of the \d+ images of data.validation_split = '.*' are in data.{kind}_split"):
        assemble(validated, devices.start(validated.run))


def test_run_whose_own_images_changed_is_not_resumed(config, tmp_path):
    images, _ = open_split(task("cifar100_excerpt"), "train[:40]").take(np.arange(40))
    for number, pixels in enumerate(images):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    config.data.task, config.data.train_split, config.data.test_split = f"folder:{tmp_path / 'photos'}", "", ""
    loop.train(config, tmp_path / "run")
    (tmp_path / "photos" / "a").rename(tmp_path / "photos" / "z")
    for call in (loop.train, loop.evaluate):
        with pytest.raises(ConfigError, match="the classes of folder:.* have changed since this run began"):
            call(config, tmp_path / "run")
    (tmp_path / "photos" / "z").rename(tmp_path / "photos" / "a")
    file.unlink()
    with pytest.raises(ConfigError, match="the images of folder:.* have changed since this run began"):
        loop.train(config, tmp_path / "run")


def test_predictions_that_cannot_be_written_do_not_cost_the_last_state(config, tmp_path, monkeypatch):
    original = outputs.whole_file

    def full(path):
        if path.name == outputs.PREDICTIONS:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(outputs, "whole_file", full)
        loop.train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "12").is_dir()
    assert loop.train(config, tmp_path).finished and (tmp_path / outputs.PREDICTIONS).is_file()
